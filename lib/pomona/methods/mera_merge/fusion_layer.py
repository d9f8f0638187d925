"""AdapterFusion (Pfeiffer et al. 2021, arXiv 2005.00247): adapters side by side under attention that is learned.

At every site, with x what the adapters read and z_i the change that adapter i would make::

    scores_i = (Q x + q) . (K z_i + k)
    change   = sum_i softmax(scores)_i V z_i

Q and K are d by d with biases, V is d by d without, and starts as the identity with 1e-6 beside the diagonal. The
adapters stay as they are; Q, K and V are trained, with `regularisation` on V. As in AdapterHub's implementation the
scores are not divided by the root of d, dropout falls on them, and keys and values are the changes alone, without the
residual connection (there ``residual_before`` false).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pomona.errors import DataError
from pomona.methods.mera_merge.adapters import Adapter
from pomona.methods.mera_merge.bottleneck import AdapterLayer, Attached, check_fit, placement

STRENGTH = 0.01
"""Of the pull of V towards the identity, AdapterHub's."""
_STD = 0.02


class FusionLayer(nn.Module):
    """The change that several adapters make together at one site; (..., d) to (..., d)."""

    def __init__(self, adapters: Sequence[AdapterLayer], dropout: float, random: torch.Generator) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters).requires_grad_(False)
        width = adapters[0].down.in_features
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False)
        self.dropout = dropout
        with torch.no_grad():
            for map_ in (self.query, self.key):
                map_.weight.normal_(std=_STD, generator=random)
                map_.bias.zero_()
            self.value.weight.fill_(1e-6).fill_diagonal_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        changes = torch.stack([adapter(x) for adapter in self.adapters], -2)
        scores = (self.key(changes) @ self.query(x)[..., None])[..., 0]
        shares = functional.dropout(scores, self.dropout, self.training).softmax(-1)
        # V is linear, so it is applied once, to the mixture.
        mixed: Tensor = self.value((shares[..., None, :] @ changes)[..., 0, :])
        return mixed


def attach_fused(model: Any, adapters: Sequence[Adapter], random: torch.Generator) -> Attached:
    """Put `adapters` side by side into `model`, each site with a new `FusionLayer`.

    Raises:
        DataError: one does not fit the model, or they sit in different places or compute differently.
    """
    hows = [placement(adapter) for adapter in adapters]
    for adapter, how in zip(adapters, hows, strict=True):
        check_fit(model, adapter.label, adapter.sites(), how)
        if how != hows[0]:
            raise DataError(
                f"adapters {adapters[0].label} and {adapter.label} differ in their configuration and cannot be fused"
            )
    dropout = float(getattr(model.config, "attention_probs_dropout_prob", 0.0))
    sites = [adapter.sites() for adapter in adapters]
    fused = {
        site: FusionLayer([AdapterLayer(one[site], hows[0]) for one in sites], dropout, random) for site in sites[0]
    }
    return Attached(model, fused, hows[0])


def regularisation(layers: Iterable[FusionLayer]) -> Tensor:
    """`STRENGTH` times the squared distance of every V from the identity."""
    terms = []
    for layer in layers:
        weight = layer.value.weight
        terms.append((weight - torch.eye(len(weight), device=weight.device)).square().sum())
    return STRENGTH * torch.stack(terms).sum()
