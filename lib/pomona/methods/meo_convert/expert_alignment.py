"""Which hidden unit of one expert is which of another: a network computes the same in any order of its units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pomona.errors import CheckFailed
from pomona.methods.meo_convert.layouts import ExpertLayer, Role, Slice
from pomona.models.checkpoint import Checkpoint
from pomona.models.matching import assignment, distances


@dataclass(frozen=True)
class Alignment:
    """How experts are matched before they are merged.

    Attributes:
        features: of a hidden unit: its weights (row of gate and up, column of down, which live in the residual stream,
            where all experts agree on the axes), or its activations on the same tokens.
        reference: by layer, the expert that the others are matched to.
        inputs: by layer, what the experts see, (tokens, d); for activations.
        activation: the nonlinearity's name in transformers, as config.json has it; for activations.
    """

    features: Literal["weights", "activations"]
    reference: Mapping[str, int]
    inputs: Mapping[str, Tensor]
    activation: str = "silu"


@dataclass(frozen=True)
class Matched:
    """The experts of one layer, matched.

    Attributes:
        permutations: of each expert; unit i of the reference is unit p[i] of the expert.
        cost_before: distance between units of the same number, summed over units and experts.
        cost_after: between matched units.
        moved: share of the units, the reference's apart, that were matched to one of another number.
    """

    permutations: tuple[Tensor, ...]
    cost_before: float
    cost_after: float
    moved: float


def match(checkpoint: Checkpoint, layer: ExpertLayer, alignment: Alignment) -> Matched:
    """Match every expert of `layer` to the reference by the assignment of least total distance.

    One assignment an expert: the time grows with the cube of the width.

    Raises:
        CheckFailed: weights or activations are not finite.
    """
    chosen = alignment.reference[layer.name]
    reference = _features(checkpoint, layer, chosen, alignment)
    permutations: list[Tensor] = []
    before = after = moved = 0.0
    for expert in range(layer.experts):
        if expert == chosen:
            permutations.append(torch.arange(reference[0].shape[0]))
            continue
        cost = _cost(reference, _features(checkpoint, layer, expert, alignment))
        permutation = assignment(cost)
        rows = torch.arange(len(cost))
        before += float(cost.diagonal().sum())
        after += float(cost[rows, permutation].sum())
        moved += float((permutation != rows).double().mean())
        permutations.append(permutation)
    return Matched(tuple(permutations), before, after, moved / max(1, layer.experts - 1))


def _cost(reference: list[Tensor], other: list[Tensor]) -> Tensor:
    """Euclidean distance over all features, (f, f): squares of the parts add up, so they are never held at once."""
    squared = torch.zeros(len(reference[0]), len(other[0]), dtype=torch.float64)
    for left, right in zip(reference, other, strict=True):
        squared += distances(left, right).square_()
    return squared.sqrt_()


def _features(checkpoint: Checkpoint, layer: ExpertLayer, expert: int, alignment: Alignment) -> list[Tensor]:
    """What describes the hidden units of an expert, in parts of (f, anything)."""
    maps = {role: part(checkpoint, parts[expert]) for role, parts in layer.maps.items()}
    if alignment.features == "activations":
        hidden = activations(alignment.inputs[layer.name], maps, alignment.activation)
        if not bool(hidden.isfinite().all()):
            raise CheckFailed(f"layer {layer.name}: the activations of expert {expert} are not finite")
        return [hidden.T]
    return [rows.T if role == "down" else rows for role, rows in maps.items()]


def activations(inputs: Tensor, maps: Mapping[Role, Tensor], activation: str) -> Tensor:
    """Hidden units of an expert, (tokens, f), float32: act(x gate^T) * (x up^T), or act(x up^T) without a gate."""
    from transformers.activations import ACT2FN

    act = ACT2FN[activation]
    up = inputs.float() @ maps["up"].float().T
    hidden: Tensor = act(inputs.float() @ maps["gate"].float().T) * up if "gate" in maps else act(up)
    return hidden


def part(checkpoint: Checkpoint, found: Slice) -> Tensor:
    """The numbers of a slice, memory-mapped."""
    count = 1
    for size in found.shape:
        count *= size
    return checkpoint.span(found.tensor, found.start, count).reshape(found.shape)
