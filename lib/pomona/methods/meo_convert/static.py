"""Experts merged once, offline, into a plain model (task level of the paper).

W = sum_j w_j W_j and b = sum_j w_j b_j over the experts of a layer, with weights that sum to 1. Where the gates of the
mixture do not sum to 1 (OLMoE, Qwen2-MoE), their mean sum scales the output map alone: in all three maps of a gated
network it would count two or three times.

Each tensor is read from mapped files, summed in float64 block by block, rounded to float32 and then to the number
format written, and appended; memory holds one tensor of the output at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pomona.errors import DataError
from pomona.methods.meo_convert.expert_alignment import Alignment, Matched, match, part
from pomona.methods.meo_convert.families import Family
from pomona.methods.meo_convert.layouts import ExpertLayer, Role, Slice
from pomona.methods.meo_convert.plan import Copied, Merged, Output, Zeros, plan
from pomona.models.checkpoint import DTYPES, Checkpoint, write_config, write_shards
from pomona.runtime.progress import Progress, Quiet

BLOCK = 1 << 21
"""Numbers of all experts together that are summed at a time: 16 MB in float64."""


@dataclass(frozen=True)
class StaticResult:
    """What was written, and how the experts of each layer stood to each other.

    Attributes:
        provenance: of each tensor of the output: what it was made from.
        merged: of each layer the tensors of its merged maps, by role.
        cosine: of each layer, mean cosine between the weights of two experts, as they were merged; None of one expert,
            or where an expert is all zeros.
        alignment: of each layer cost_before, cost_after and moved, empty without alignment.
        config: config.json as written.
        files: names of those written.
    """

    arch: str
    provenance: dict[str, dict[str, Any]]
    merged: dict[str, dict[Role, str]]
    cosine: dict[str, float | None]
    alignment: dict[str, dict[str, float]]
    config: dict[str, Any]
    files: list[str]


def convert(
    checkpoint: Checkpoint,
    family: Family,
    *,
    arch: str,
    weights: Mapping[str, Sequence[float]],
    align: Alignment | None,
    mass: Mapping[str, float],
    folder: Path,
    shard_bytes: int,
    dtype: str = "source",
    progress: Progress | None = None,
) -> StaticResult:
    """Merge the experts of every layer into one and write the model into `folder`.

    Args:
        arch: auto, single-expert or dense-twin.
        weights: of the experts of each layer; they are divided by their sum.
        align: how to match hidden units first; None leaves them.
        mass: of each layer, what scales its output map; 1 where it has none.
        dtype: source, float32, bfloat16 or float16.
        progress: is advanced by each tensor written.

    Raises:
        UsageError: the family has no such architecture.
        DataError: weights or mass are not one for each expert, or not usable.
        CheckFailed: a number is not finite.
        OutputError: the disk is full.
    """
    planned = plan(checkpoint, family, arch=arch, dtype=dtype)
    if align is not None and family.kind == "meo":
        raise DataError(
            "the experts of a converted model are single linear maps, whose outputs are not to be permuted",
            hint="use --align none",
        )
    shares = {layer.name: _shares(layer, weights) for layer in family.layers}
    scales = {layer.name: _scale(layer, mass) for layer in family.layers}
    told = progress or Quiet()
    matched: dict[str, Matched] = {}
    if align is not None:
        told.start("matching hidden units of experts", len(family.layers))
        for layer in family.layers:
            matched[layer.name] = match(checkpoint, layer, align)
            told.advance()
    work = _Work(checkpoint, shares, scales, matched)
    outputs = {output.spec.name: output for output in planned.outputs}
    told.start("merging experts", len(planned.specs))
    files = write_shards(
        folder, planned.specs, lambda name: work.tensor(outputs[name]), shard_bytes=shard_bytes, progress=told
    )
    write_config(folder, planned.config)
    return StaticResult(
        planned.arch,
        {name: work.provenance(output) for name, output in outputs.items()},
        {layer.name: {o.role: o.spec.name for o in _of(layer, planned.outputs)} for layer in family.layers},
        {layer.name: cosine(work.products[layer.name]) for layer in family.layers},
        {
            name: {"cost_before": found.cost_before, "cost_after": found.cost_after, "moved": found.moved}
            for name, found in matched.items()
        },
        planned.config,
        ["config.json", *files],
    )


def merge(experts: Iterator[Tensor], shares: Tensor, products: Tensor) -> Iterator[Tensor]:
    """Weighted sums of blocks of stacked experts, and their products.

    Args:
        experts: blocks of (n, m), float64.
        shares: (n,), float64, sum 1.
        products: (n, n), to which the scalar products of the experts over each block are added.

    Yields:
        (m,) of each block.
    """
    for block in experts:
        products += block @ block.T
        yield shares @ block


def cosine(products: Tensor) -> float | None:
    """Mean cosine between two different experts from all their scalar products, (n, n)."""
    count = len(products)
    norms = products.diagonal().sqrt()
    if count < 2 or not bool((norms > 0).all()):
        return None
    cosines = products / norms[:, None] / norms[None]
    mean = float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))
    return max(-1.0, min(1.0, mean))


@dataclass
class _Work:
    checkpoint: Checkpoint
    shares: Mapping[str, Tensor]
    scales: Mapping[str, float]
    matched: Mapping[str, Matched]
    products: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, output: Output) -> Tensor:
        dtype = DTYPES[output.spec.dtype]
        if isinstance(output, Zeros):
            return torch.zeros(output.spec.shape, dtype=dtype)
        if isinstance(output, Copied):
            found = self.checkpoint.read(output.source)
            return found if found.dtype == dtype else found.to(dtype)
        return self._merged(output, dtype)

    def _merged(self, output: Merged, dtype: torch.dtype) -> Tensor:
        layer, name = output.layer, output.layer.name
        parts = layer.maps[output.role]
        shape = parts[0].shape
        products = self.products.setdefault(name, torch.zeros(len(parts), len(parts), dtype=torch.float64))
        scale = self.scales[name] if output.role == "down" else 1.0
        merged = torch.empty(math.prod(shape), dtype=dtype)
        end = 0
        for block in merge(self._blocks(layer, output.role), self.shares[name], products):
            merged[end : end + len(block)] = (block * scale).float()
            end += len(block)
        merged = merged.reshape(shape)
        return merged.T.contiguous() if layer.transposed and merged.dim() == 2 else merged

    def _blocks(self, layer: ExpertLayer, role: Role) -> Iterator[Tensor]:
        """The maps `role` of all experts, (n, rows * columns) of a few rows at a time, in matched order."""
        parts = layer.maps[role]
        rows, columns = parts[0].shape[0], math.prod(parts[0].shape[1:])
        step = max(1, BLOCK // (len(parts) * columns))
        matched = self.matched.get(layer.name)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            block = torch.empty(len(parts), last - first, columns, dtype=torch.float64)
            for expert, found in enumerate(parts):
                order = None if matched is None else matched.permutations[expert]
                block[expert] = self._rows(found, role, order, first, last)
            yield block.flatten(1)

    def _rows(self, found: Slice, role: Role, order: Tensor | None, first: int, last: int) -> Tensor:
        columns = math.prod(found.shape[1:])
        if order is not None and role != "down":
            return part(self.checkpoint, found)[order[first:last]]
        rows = self.checkpoint.span(found.tensor, found.start + first * columns, (last - first) * columns)
        rows = rows.reshape(last - first, columns)
        return rows if order is None else rows[:, order]

    def provenance(self, output: Output) -> dict[str, Any]:
        told: dict[str, Any] = {"dtype": output.spec.dtype}
        if isinstance(output, Copied):
            return told | {"copied": output.source}
        if isinstance(output, Zeros):
            return told | {"zeros": output.why}
        name = output.layer.name
        told["merged"] = [_place(found) for found in output.layer.maps[output.role]]
        told["weights"] = self.shares[name].tolist()
        if output.role == "down" and self.scales[name] != 1.0:
            told["scale"] = self.scales[name]
        if name in self.matched:
            told["permutations"] = [digest(p) for p in self.matched[name].permutations]
        return told


def digest(permutation: Tensor) -> str:
    """SHA-256 of a permutation as little-endian 64-bit numbers."""
    return hashlib.sha256(permutation.numpy().astype("<i8").tobytes()).hexdigest()


def _place(found: Slice) -> str:
    return found.tensor if found.start == 0 else f"{found.tensor}[{found.start}:]"


def _of(layer: ExpertLayer, outputs: Sequence[Output]) -> list[Merged]:
    return [output for output in outputs if isinstance(output, Merged) and output.layer is layer]


def _shares(layer: ExpertLayer, weights: Mapping[str, Sequence[float]]) -> Tensor:
    own = weights.get(layer.name)
    if own is None and layer.name.endswith(".up_proj"):  # which shares the gate of gate_proj, as it shares its input
        own = weights.get(f"{layer.name.removesuffix('up_proj')}gate_proj")
    if own is None:
        raise DataError(f"layer {layer.name} has no weights for its experts")
    found = torch.tensor([float(weight) for weight in own], dtype=torch.float64)
    if len(found) != layer.experts:
        raise DataError(f"layer {layer.name} has {layer.experts} experts, but {len(found)} weights")
    total = float(found.sum())
    if not (bool(found.isfinite().all()) and bool((found >= 0).all()) and total > 0):
        raise DataError(f"layer {layer.name}: weights must be finite, 0 or more, and not all 0: {found.tolist()}")
    return found / total


def _scale(layer: ExpertLayer, mass: Mapping[str, float]) -> float:
    scale = float(mass.get(layer.name, 1.0))
    if not (math.isfinite(scale) and scale > 0):
        raise DataError(f"layer {layer.name}: the mass of its gates is {scale}; it must be positive")
    return scale
