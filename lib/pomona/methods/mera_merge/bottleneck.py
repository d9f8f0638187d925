"""Bottleneck adapters at their places inside a base model of the BERT family.

The three placements in use, each a setting of the same flags of AdapterHub's configuration:

- ``seq_bn`` (Pfeiffer et al. 2020): after the feed-forward map, behind the base's own residual and normalisation;
- ``double_seq_bn`` (Houlsby et al. 2019): after attention and after the feed-forward map, before both;
- ``par_bn`` (He et al. 2021): beside the feed-forward map, on its input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pomona.errors import DataError
from pomona.methods.mera_merge.adapters import Adapter, Bottleneck

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
"""Model types whose layers end attention and feed-forward map alike: dense, dropout, residual, normalisation."""

_LAYER = re.compile(r"(?:^|\.)layer\.(\d+)\.")
# What a flag must be for the adapter to be the bottleneck this module computes.
_REQUIRED = {
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "phm_layer": False,
    "inv_adapter": None,
    "invertible_adapter": None,
    "cross_adapter": False,
    "stochastic_depth": 0.0,
}
_READ = {
    "non_linearity",
    "original_ln_before",
    "original_ln_after",
    "residual_before_ln",
    "is_parallel",
    "scaling",
    "dropout",
    "leave_out",
}
_SILENT = {
    "mh_adapter",
    "output_adapter",
    "reduction_factor",
    "adapter_residual_before_ln",  # of ln_after alone
    "init_weights",
    "init_weights_seed",
    "inv_adapter_reduction_factor",
    "new_attention_norm",
    "hypercomplex_nonlinearity",
    "learn_phm",
}


@dataclass(frozen=True)
class Placement:
    """What an adapter's configuration says of how it sits in a layer.

    Attributes:
        norm_before: the base's residual and normalisation come before the adapter.
        norm_after: they come after it, on the adapter's output.
        residual: what is added to the adapter's change: the sub-layer's output (True), that plus the sub-layer's input
            ("post_add"), or both normalised (False).
        parallel: the adapter reads the sub-layer's input, and its change is added to the sub-layer's output.
        left_out: layers without an adapter.
    """

    activation: str
    norm_before: bool
    norm_after: bool
    residual: bool | Literal["post_add"]
    parallel: bool
    scaling: float
    dropout: float
    attention: bool
    output: bool
    left_out: frozenset[int]


def placement(adapter: Adapter) -> Placement:
    """How the configuration of `adapter` places it.

    Raises:
        DataError: a flag, named, asks for something that is not computed here.
    """
    if adapter.kind != "bottleneck":
        raise DataError(f"adapter {adapter.label}: it is of kind {adapter.kind}, not a bottleneck adapter")
    flags = adapter.settings

    def refuse(name: str, why: str) -> DataError:
        return DataError(f"adapter {adapter.label}: {name} is {flags.get(name)!r}: {why}")

    for name, required in _REQUIRED.items():
        if (flags.get(name) or None) != (required or None):
            raise refuse(name, "such adapters are not computed")
    known = {*_REQUIRED, *_SILENT, *_READ}
    for name in flags:
        if name not in known and "phm" not in name.lower() and flags[name]:
            raise refuse(name, "a flag whose meaning is not known here")
    scaling = flags.get("scaling", 1.0)
    if isinstance(scaling, bool) or not isinstance(scaling, int | float):
        raise refuse("scaling", "only a number is computed")
    residual = flags.get("residual_before_ln", True)
    before = bool(flags.get("original_ln_before", False))
    if residual not in (True, False, "post_add") or (residual == "post_add" and not before):
        raise refuse("residual_before_ln", "expected true, false, or post_add where original_ln_before is true")
    name = str(flags.get("non_linearity", "relu")).lower()
    if nonlinearity(name) is None:
        raise refuse("non_linearity", "no such activation")
    return Placement(
        activation=name,
        norm_before=before,
        norm_after=bool(flags.get("original_ln_after", True)),
        residual=residual,
        parallel=bool(flags.get("is_parallel", False)),
        scaling=float(scaling),
        dropout=float(flags.get("dropout") or 0.0),
        attention=bool(flags.get("mh_adapter", False)),
        output=bool(flags.get("output_adapter", True)),
        left_out=frozenset(flags.get("leave_out") or ()),
    )


_PLAIN: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
    "leakyrelu": nn.LeakyReLU,
}


def nonlinearity(name: str) -> nn.Module | None:
    """The activation that AdapterHub calls `name`, None where there is no such one."""
    if name in _PLAIN:
        return _PLAIN[name]()
    from transformers.activations import ACT2FN  # which a merge with one of the usual ones need not wait for

    try:
        found: nn.Module = ACT2FN[name]
    except KeyError:
        return None
    return found


class AdapterLayer(nn.Module):
    """The change one adapter makes at one site: ``scaling (up phi(down x + down_bias) + up_bias)``.

    (..., d) to (..., d). The residual connection around it is the place's: see `AdaptedOutput`.
    """

    def __init__(self, site: Bottleneck, how: Placement) -> None:
        super().__init__()
        width, inner = site.up.shape
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        activation = nonlinearity(how.activation)
        assert activation is not None, "placement() has looked"
        self.activation = activation
        self.scaling, self.dropout = how.scaling, how.dropout
        with torch.no_grad():
            for mine, given in zip(self.parameters(), (site.down, site.down_bias, site.up, site.up_bias), strict=True):
                mine.copy_(given)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.up(self.activation(self.down(x))) * self.scaling
        return functional.dropout(change, self.dropout, self.training)

    def site(self) -> Bottleneck:
        """The present parameters, on the CPU, apart from those that go on being trained."""
        parts = (self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        return Bottleneck(*(part.detach().cpu().clone() for part in parts))


class AdaptedOutput(nn.Module):
    """The end of a sub-layer, as ``BertOutput`` and its like, with an adapter in it.

    Args:
        plain: the module in whose place this one stands; its parts are used, not copied.
        change: (..., d) to (..., d), what the adapter adds.
    """

    def __init__(self, plain: nn.Module, change: nn.Module, how: Placement) -> None:
        super().__init__()
        self.dense: Any = plain.dense
        self.dropout: Any = plain.dropout
        self.LayerNorm: Any = plain.LayerNorm
        self.change, self.how = change, how

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.adapted(self.dropout(self.dense(hidden_states)), input_tensor)

    def adapted(self, hidden: Tensor, entering: Tensor) -> Tensor:
        """What leaves the sub-layer, whose map gave `hidden` and whose residual connection brings `entering`."""
        how = self.how
        if how.parallel:
            hidden = hidden + self.change(entering)
        else:
            read = hidden
            if how.norm_before:
                summed = hidden + entering
                read = self.LayerNorm(summed)
            residual = hidden if how.residual is True else summed if how.residual == "post_add" else read
            hidden = self.change(read) + residual
        left: Tensor = self.LayerNorm(hidden + entering) if how.norm_after else hidden
        return left


@dataclass(frozen=True, order=True)
class Place:
    """Where a site is: after attention (0) or the feed-forward map (1) of a layer. Places are ordered by depth."""

    layer: int
    half: int

    @classmethod
    def of(cls, site: str) -> Place:
        """Read off the name of a site, as ``encoder.layer.3.attention.output``.

        Raises:
            DataError: the name tells no layer.
        """
        found = _LAYER.search(f"{site}.")
        if found is None:
            raise DataError(f"site {site}: its name does not tell the layer", hint="expected ...layer.N.output")
        return cls(int(found[1]), 0 if site[found.end() :].startswith("attention") else 1)

    def owner(self, model: Any) -> nn.Module:
        """The module of `model` whose attribute ``output`` is the end of the sub-layer."""
        layer: nn.Module = layers(model)[self.layer]
        return layer.attention if self.half == 0 else layer  # type: ignore[return-value]  # nn.Module's attributes


def layers(model: Any) -> nn.ModuleList:
    """The layers of `model`, with or without a head.

    Raises:
        DataError: it is not of a family that adapters can be attached to here.
    """
    if model.config.model_type not in FAMILIES:
        raise DataError(
            f"a base model of type {model.config.model_type} cannot take bottleneck adapters here",
            hint=f"the types that can: {', '.join(FAMILIES)}",
        )
    found: nn.ModuleList = model.base_model.encoder.layer
    return found


class Attached:
    """Adapters inside a model, until `remove` or the end of a ``with`` block takes them out again.

    Attributes:
        changes: by site, by depth: what computes the change there, an `AdapterLayer` unless adapters are fused.
    """

    def __init__(self, model: Any, changes: Mapping[str, nn.Module], how: Placement) -> None:
        self.model = model
        places = {site: Place.of(site) for site in changes}
        self.changes = {
            site: changes[site].to(model.device, model.dtype) for site in sorted(changes, key=places.__getitem__)
        }
        self._plain = []
        for site, change in self.changes.items():
            owner = places[site].owner(model)
            self._plain.append((owner, owner.output))
            owner.output = AdaptedOutput(owner.output, change, how).train(model.training)  # type: ignore[arg-type]

    def remove(self) -> None:
        """The model as it was."""
        while self._plain:
            owner, plain = self._plain.pop()
            owner.output = plain

    def parameters(self) -> int:
        """How many there are in the model now that were not there before."""
        return sum(parameter.numel() for change in self.changes.values() for parameter in change.parameters())

    def sites(self) -> dict[str, Bottleneck]:
        """The present parameters of a single adapter."""
        return {site: layer.site() for site, layer in self.changes.items() if isinstance(layer, AdapterLayer)}

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach(model: Any, adapter: Adapter) -> Attached:
    """Put `adapter` into `model`, whose outputs from then on are those of the adapted model.

    Raises:
        DataError: the adapter does not fit: a flag, the family, a layer that is missing on either side, a width.
    """
    how = placement(adapter)
    sites = adapter.sites()
    check_fit(model, adapter.label, sites, how)
    return Attached(model, {site: AdapterLayer(values, how) for site, values in sites.items()}, how)


def check_fit(model: Any, label: str, sites: Mapping[str, Bottleneck], how: Placement) -> None:
    """That there is a site for every place of `how`, and a place of the right width for every site.

    Raises:
        DataError: there is not.
    """
    count = len(layers(model))
    halves = [half for half, wanted in ((0, how.attention), (1, how.output)) if wanted]
    due = {Place(layer, half) for layer in range(count) if layer not in how.left_out for half in halves}
    found = {Place.of(site): site for site in sites}
    for place in sorted(due ^ found.keys()):
        where = f"the {'attention' if place.half == 0 else 'feed-forward map'} of layer {place.layer}"
        if place in due:
            raise DataError(f"adapter {label}: it has nothing for {where}, which its configuration names")
        why = f"the base model has {count} layers" if place.layer >= count else "its configuration does not name it"
        raise DataError(f"adapter {label}: it has tensors for {where}, but {why}")
    width = model.config.hidden_size
    for site, values in sites.items():
        if values.down.shape[1] != width:
            raise DataError(f"adapter {label}: {site} has width {values.down.shape[1]}, the base model {width}")
