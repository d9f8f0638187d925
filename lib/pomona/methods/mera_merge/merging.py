"""From adapters to one, by the method of their kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pomona.errors import CheckFailed, UsageError
from pomona.methods.mera_merge import fusion, heads, lowrank
from pomona.methods.mera_merge.adapters import Adapter
from pomona.methods.mera_merge.alignment import Matching
from pomona.methods.mera_merge.config import BOTTLENECK_METHODS, LORA_METHODS, Config, regularisation

METHODS = {"bottleneck": BOTTLENECK_METHODS, "lora": LORA_METHODS, "ia3": ("avg",)}
NAMES = {"bottleneck": "bottleneck adapters", "lora": "LoRA adapters", "ia3": "(IA)³ adapters"}
_DEFAULT = {"bottleneck": "wts", "lora": "delta-svd", "ia3": "avg"}


@dataclass(frozen=True)
class Merged:
    """The merged adapter and what its merge tells.

    Attributes:
        matchings: by label and site, for the methods that match units.
        deviations: by module of a LoRA, how far its map is from the weighted sum of the adapters' maps, relative.
        provenance: of each tensor, its sources with their weights.
    """

    adapter: Adapter
    matchings: Mapping[str, Mapping[str, Matching]]
    deviations: Mapping[str, float]
    provenance: Mapping[str, Any]


def method_of(config: Config, kind: str) -> str:
    """The method asked for, or the default for adapters of this kind.

    Raises:
        UsageError: it is a method for adapters of another kind, or has no use for an option that was given.
    """
    method = config.method or _DEFAULT[kind]
    if method not in METHODS[kind]:
        raise UsageError(f"--method {method} is not for {NAMES[kind]}", hint=f"give {' or '.join(METHODS[kind])}")
    if config.rank is not None and method != "delta-svd":
        raise UsageError(f"--rank is for delta-svd; {method} cuts no ranks")
    if regularisation(config.solver) is not None and method not in ("wts", "acts"):
        raise UsageError(f"--solver {config.solver} is for wts and acts; {method} transports nothing")
    return method


def reference_of(
    config: Config, method: str, adapters: Sequence[Adapter], activations: fusion.Activations | None
) -> int:
    """The place of the adapter whose units the others are matched to; ``first`` and ``medoid`` come before labels.

    Raises:
        UsageError: no adapter has that label, or these have no units to compare.
    """
    labels = [adapter.label for adapter in adapters]
    if config.reference == "first":
        return 0
    if config.reference != "medoid":
        if config.reference in labels:
            return labels.index(config.reference)
        raise UsageError(f"--reference {config.reference}: no adapter is called so", hint=f"give {', '.join(labels)}")
    if adapters[0].kind != "bottleneck":
        raise UsageError(f"--reference medoid is not for {NAMES[adapters[0].kind]}", hint="their units are not matched")
    return fusion.medoid(
        adapters,
        method=method,
        features=config.features,
        metric=config.metric,
        solver=regularisation(config.solver),
        activations=activations,
    )


def merge(
    adapters: Sequence[Adapter],
    config: Config,
    method: str,
    weights: Sequence[float],
    reference: int,
    activations: fusion.Activations | None,
) -> Merged:
    """The adapters as one, with the prediction head that `config` asks for.

    Args:
        activations: by label and site, (tokens, units); what ``acts`` compares.

    Raises:
        CheckFailed: a tensor of the result is not finite.
        DataError: the adapters' heads cannot be merged as asked.
    """
    chosen = adapters[reference]
    head, head_config = heads.merged(adapters, choice=config.heads, weights=weights, reference=reference)
    matchings: Mapping[str, Mapping[str, Matching]] = {}
    deviations: Mapping[str, float] = {}
    if chosen.kind == "bottleneck":
        fused = fusion.fuse(
            adapters,
            method=method,
            weights=weights,
            reference=reference,
            features=config.features,
            metric=config.metric,
            solver=regularisation(config.solver),
            activations=activations,
        )
        merged, matchings, provenance = fused.adapter, fused.sites, fused.provenance
    else:
        merged = _product(adapters, method, weights, config.rank)
        if chosen.kind == "lora":
            deviations = lowrank.deviation(merged, adapters, weights)
        provenance = _provenance(merged, adapters, weights)
    for name, tensor in merged.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckFailed(f"{name} is not finite once merged", hint="are the weights of the adapters too large?")
    return Merged(dataclasses.replace(merged, head=head, head_config=head_config), matchings, deviations, provenance)


def average(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter | None:
    """The plain average of bottleneck adapters, a baseline; None where their widths are unequal."""
    if len({tuple(site.down.shape) for adapter in adapters for site in adapter.sites().values()}) != 1:
        return None
    total = sum(weights)
    shares = [weight / total for weight in weights] if total else [1 / len(adapters)] * len(adapters)
    return fusion.fuse(
        adapters,
        method="avg",
        weights=shares,
        reference=0,
        features="down",
        metric="euclidean",
        solver=None,
        activations=None,
    ).adapter


def _product(adapters: Sequence[Adapter], method: str, weights: Sequence[float], rank: int | None) -> Adapter:
    if method == "delta-svd":
        return lowrank.delta_svd(adapters, weights, rank)[0]
    rules = {"delta-cat": lowrank.delta_cat, "linear": lowrank.linear, "avg": lowrank.ia3_average}
    return rules[method](adapters, weights)


def _provenance(merged: Adapter, adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Any]:
    sources = dict(zip((adapter.label for adapter in adapters), weights, strict=True))
    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "sources": sources}
        for name, tensor in merged.tensors.items()
    }
