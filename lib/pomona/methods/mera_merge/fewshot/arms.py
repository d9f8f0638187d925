"""What is tuned: the merged adapter, and with ``--baselines`` what could be tuned instead.

=============  ==========================================================================================
arm            tuned beside a linear head; the base is frozen unless said otherwise
=============  ==========================================================================================
merged         the merged adapter
single:LABEL   one of the adapters that were merged
average        their plain average, units as they come
fusion         AdapterFusion's queries, keys and values over all of them, the adapters frozen
fresh          an adapter that was never trained, initialised as AdapterHub does
full           no adapter, the whole base at `FULL_RATE`, with the base's own dropout
=============  ==========================================================================================
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pomona.methods.mera_merge.adapters import Adapter, Bottleneck, with_sites
from pomona.methods.mera_merge.bottleneck import Attached, attach
from pomona.methods.mera_merge.fewshot.inputs import Inputs, Prefix, pooled, resume
from pomona.methods.mera_merge.fewshot.tuning import Network
from pomona.methods.mera_merge.fusion_layer import FusionLayer, attach_fused, regularisation
from pomona.runtime.seeds import derive

FULL_RATE = 5e-5
"""Step size of a base that is tuned whole, the largest of those that BERT was published with."""
_STD = 0.02


def names(adapters: Sequence[Adapter], baselines: bool) -> list[str]:
    """The arms, in the order in which they are reported."""
    if not baselines:
        return ["merged"]
    singles = [f"single:{adapter.label}" for adapter in adapters]
    return ["merged", *singles, "average", "fusion", "fresh", "full"]


@contextmanager
def built(
    arm: str,
    model: Any,
    candidates: Mapping[str, Adapter],
    sources: Sequence[Adapter],
    head: nn.Linear,
    *,
    inputs: Inputs,
    prefix: Prefix,
    pooling: str,
    rate: float,
    random: torch.Generator,
) -> Iterator[tuple[Network, Attached | None]]:
    """The network of `arm`, inside `model` until the block ends.

    Args:
        candidates: the adapter of every arm that tunes one that is there.
        sources: those that are fused; the first one's shape is a fresh adapter's.
        head: (d to labels), tuned in place.
        random: what new parameters are drawn from.
    """
    if arm == "full":
        yield _whole(model, head, inputs, pooling, rate), None
        return
    if arm == "fusion":
        attached = attach_fused(model, sources, random)
    else:
        attached = attach(model, fresh(sources[0], random) if arm == "fresh" else candidates[arm])
    with attached:
        yield network(model, attached, head, prefix, pooling=pooling, rate=rate), attached


def network(model: Any, attached: Attached, head: nn.Linear, prefix: Prefix, *, pooling: str, rate: float) -> Network:
    """`head` behind `model` with what is attached; what requires gradients is tuned."""
    changes = list(attached.changes.values())
    fused = [change for change in changes if isinstance(change, FusionLayer)]

    def logits(places: Sequence[int]) -> Tensor:
        halted = prefix.at(places)
        found: Tensor = head(pooled(resume(model, prefix.place, halted), halted.real, pooling))
        return found

    def penalty() -> Tensor:
        return regularisation(fused)

    tuned = [p for module in (*changes, head) for p in module.parameters() if p.requires_grad]
    return Network(logits, [{"params": tuned, "lr": rate}], penalty if fused else None, changes)


def _whole(model: Any, head: nn.Linear, inputs: Inputs, pooling: str, rate: float) -> Network:
    base = copy.deepcopy(model.base_model).requires_grad_(True)
    tuned = [parameter for name, parameter in base.named_parameters() if not name.startswith("pooler.")]

    def logits(places: Sequence[int]) -> Tensor:
        batch = inputs.batch(places)
        found: Tensor = head(pooled(base(**batch).last_hidden_state, batch["attention_mask"].bool(), pooling))
        return found

    groups: list[dict[str, object]] = [
        {"params": tuned, "lr": FULL_RATE},
        {"params": list(head.parameters()), "lr": rate},
    ]
    return Network(logits, groups, None, [base])


def fresh(like: Adapter, random: torch.Generator) -> Adapter:
    """A new adapter of the shape of `like`, initialised as its configuration says.

    As BERT's maps, normal with standard deviation 0.02 (AdapterHub's default), or for ``mam_adapter`` (parallel ones)
    down as torch's linear maps and up zero; biases zero.
    """
    silent = like.settings.get("init_weights") == "mam_adapter"

    def started(site: Bottleneck) -> Bottleneck:
        inner, width = site.down.shape
        down, up = torch.empty(inner, width), torch.zeros(width, inner)
        if silent:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=random)
        else:
            down.normal_(std=_STD, generator=random)
            up.normal_(std=_STD, generator=random)
        return Bottleneck(down, torch.zeros(inner), up, torch.zeros(width))

    return with_sites(like, {name: started(site) for name, site in like.sites().items()}, "fresh")


def new_head(width: int, labels: int, seed: int, number: int) -> nn.Linear:
    """The head every arm of draw `number` begins with: normal with standard deviation 0.02, biases zero."""
    head = nn.Linear(width, labels)
    random = generator(seed, f"head/{number}")
    with torch.no_grad():
        head.weight.normal_(std=_STD, generator=random)
        head.bias.zero_()
    return head


def generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, f"few-shot/{purpose}"))
