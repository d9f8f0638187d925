"""LoRA merged where it acts, in ΔW, and (IA)^3 averaged.

LoRA adds ΔW = s B A to a map, A (r, in), B (out, r), s = α / r, or α / √r with rsLoRA (arXiv 2106.09685, 2312.03732).
B Q and Q⁻¹ A give the same ΔW for any invertible Q, so that sums of factors mean nothing, and permuting rows mends
nothing: the symmetry is GL(r), not that of units. What is merged is Σ wᵢ ΔWᵢ, which has rank Σ rᵢ at most: exactly by
stacking the factors, or its best approximation of lower rank (Eckart and Young, 1936).

Results have one rank R for all modules, padded with zeros where it needs less, and s = 1: α = R. A single adapter of
weight 1 comes back as it is.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pomona.errors import CheckFailed, DataError
from pomona.methods.mera_merge import compatibility, peft_format
from pomona.methods.mera_merge.adapters import Adapter

MERGED = "merged"
"""Label of what was merged."""


class Factors(NamedTuple):
    """ΔW = scale · up @ down of one module, and what it adds to the module's bias; all float64.

    Attributes:
        down: A (r, in).
        up: B (out, r).
        bias: (out,), with the scale in it; None without lora_bias.
    """

    down: Tensor
    up: Tensor
    scale: float
    bias: Tensor | None


def factors(adapter: Adapter) -> dict[str, Factors]:
    """The factors of each module of a LoRA adapter.

    Raises:
        DataError: a factor is no matrix, or its rank is not what the configuration says.
    """
    return {module: _factors(adapter, module, n) for module, n in peft_format.module_names(adapter.tensors).items()}


def delta(adapter: Adapter) -> dict[str, Tensor]:
    """ΔW (out, in) of each module, float64; for an embedding, that of its transpose."""
    return {module: f.scale * f.up @ f.down for module, f in factors(adapter).items()}


def delta_cat(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Σ wᵢ ΔWᵢ exactly, by stacked factors: R = Σ rᵢ.

    Raises:
        DataError: an adapter holds more than low-rank factors.
        CheckFailed: a merged tensor is not finite.
    """
    if _as_it_is(adapters, weights):
        return adapters[0]
    return _rebuilt(adapters, weights, _stacked)


def delta_svd(
    adapters: Sequence[Adapter], weights: Sequence[float], rank: int | None = None
) -> tuple[Adapter, dict[str, float]]:
    """The best approximation of Σ wᵢ ΔWᵢ of rank `rank` (None: the largest of the adapters'), and its `deviation`.

    It has a smaller rank where no module has as many factors or dimensions.

    ΔW is never formed: with the stacked factors U = Q₁R₁ and Vᵀ = Q₂R₂, the singular values of U V are those of the
    small R₁R₂ᵀ.

    Raises:
        DataError: an adapter holds more than low-rank factors.
        CheckFailed: a merged tensor is not finite.
    """
    if _as_it_is(adapters, weights):
        return adapters[0], dict.fromkeys(peft_format.module_names(adapters[0].tensors), 0.0)
    kept = rank or max(
        len(adapter.tensors[names["down"]])
        for adapter in adapters
        for names in peft_format.module_names(adapter.tensors).values()
    )

    def truncated(parts: Sequence[Factors], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        down, up = _stacked(parts, weights)
        left, small_left = torch.linalg.qr(up)
        right, small_right = torch.linalg.qr(down.T)
        turned_left, values, turned_right = torch.linalg.svd(small_left @ small_right.T)
        root = values[:kept].sqrt()
        return root[:, None] * (right @ turned_right[:kept].T).T, left @ turned_left[:, :kept] * root

    merged = _rebuilt(adapters, weights, truncated)
    return merged, deviation(merged, adapters, weights)


def linear(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Factors summed one by one, as PEFT's ``linear`` does: Σ √|wᵢsᵢ| Bᵢ and Σ ±√|wᵢsᵢ| Aᵢ, which is wrong.

    Their product has the cross terms BᵢAⱼ that Σ wᵢ ΔWᵢ has not; `deviation` says by how much.

    Raises:
        DataError: an adapter holds more than low-rank factors, or ranks are not equal.
        CheckFailed: a merged tensor is not finite.
    """
    if _as_it_is(adapters, weights):
        return adapters[0]

    def summed(parts: Sequence[Factors], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        if len(ranks := {len(f.down) for f in parts}) > 1:
            raise DataError(
                f"r differs: {', '.join(map(str, sorted(ranks)))}; sums of factors need equal ranks",
                hint="--method delta-svd does not",
            )
        both = [w * f.scale for w, f in zip(weights, parts, strict=True)]
        down = sum(math.copysign(math.sqrt(abs(c)), c) * f.down for c, f in zip(both, parts, strict=True))
        up = sum(math.sqrt(abs(c)) * f.up for c, f in zip(both, parts, strict=True))
        return torch.as_tensor(down), torch.as_tensor(up)

    return _rebuilt(adapters, weights, summed)


def deviation(merged: Adapter, adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, float]:
    """‖ΔW − Σ wᵢ ΔWᵢ‖ / ‖Σ wᵢ ΔWᵢ‖ (Frobenius) of each module of `merged`, its rounding included.

    Where the weighted sum vanishes, its norm is taken to be 1e-12 of what was summed, and 1 where all of that is zero.
    """
    found = {}
    for module, (result, *parts) in _side_by_side([merged, *adapters]):
        truth = _norm(*_stacked(parts, weights))
        summed = sum(abs(w) * _norm(*_stacked([f], [1.0])) for w, f in zip(weights, parts, strict=True))
        error = _norm(*_stacked([result, *parts], [1.0, *(-w for w in weights)]))
        found[module] = error / (max(truth, 1e-12 * summed) or 1.0)
    return found


def ia3_average(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Σ wᵢ lᵢ of the vectors of (IA)^3, which is the weighted sum of what they make of a base map (arXiv 2205.05638).

    Raises:
        DataError: an adapter holds more than these vectors.
        CheckFailed: a merged tensor is not finite.
    """
    if _as_it_is(adapters, weights):
        return adapters[0]
    for adapter in adapters:
        compatibility.check_plain(adapter)
    first = adapters[0]
    tensors = {}
    for name, tensor in first.tensors.items():
        total = torch.zeros_like(tensor, dtype=torch.float64)
        for weight, adapter in zip(weights, adapters, strict=True):
            total += weight * adapter.tensors[name]
        tensors[name] = _finite(name, total.to(tensor.dtype))
    return dataclasses.replace(first, label=MERGED, tensors=tensors)


# --- parts -----------------------------------------------------------------------------------------------------------

_Rule = Callable[[Sequence[Factors], Sequence[float]], tuple[Tensor, Tensor]]
"""From the factors of one module and the weights to A (R, in) and B (out, R), s = 1."""


def _as_it_is(adapters: Sequence[Adapter], weights: Sequence[float]) -> bool:
    return len(adapters) == 1 and weights[0] == 1


def _stacked(parts: Sequence[Factors], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    down = torch.cat([f.down for f in parts])
    up = torch.cat([w * f.scale * f.up for w, f in zip(weights, parts, strict=True)], dim=1)
    return down, up


def _norm(down: Tensor, up: Tensor) -> float:
    """‖up @ down‖ without the product, and without the cancellation that traces of Gram matrices suffer."""
    return float(torch.linalg.norm(torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T))


def _rebuilt(adapters: Sequence[Adapter], weights: Sequence[float], rule: _Rule) -> Adapter:
    """The first adapter with new factors by `rule`, and the configuration that goes with them."""
    for adapter in adapters:
        compatibility.check_plain(adapter)
    first = adapters[0]
    names = peft_format.module_names(first.tensors)
    biased = any("bias" in own for a in adapters for own in peft_format.module_names(a.tensors).values())
    made: dict[str, tuple[Tensor, Tensor]] = {}
    tensors = {}
    for module, parts in _side_by_side(adapters):
        dtype = first.tensors[names[module]["down"]].dtype
        down, up = rule(parts, weights)
        made[module] = down.to(dtype), up.to(dtype)
        if biased:
            name = names[module]["up"].removesuffix("weight") + "bias"
            bias = torch.zeros(len(up), dtype=torch.float64)
            for weight, part in zip(weights, parts, strict=True):
                bias = bias if part.bias is None else bias + weight * part.bias
            tensors[name] = _finite(name, bias.to(dtype))
    rank = max(len(down) for down, _ in made.values())
    for module, (down, up) in made.items():
        padding = rank - len(down)
        for key, value, beyond in (("down", down, (0, 0, 0, padding)), ("up", up, (0, padding))):
            name = names[module][key]
            tensors[name] = _finite(name, torch.nn.functional.pad(value, beyond))
    config = {**first.config, "r": rank, "lora_alpha": rank, "use_rslora": False}
    config |= {"rank_pattern": {}, "alpha_pattern": {}} | ({"lora_bias": True} if biased else {})
    return dataclasses.replace(first, label=MERGED, tensors=tensors, config=config)


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise CheckFailed(f"{name} is not finite after merging", hint="is a weight too large?")
    return tensor.contiguous()


def _side_by_side(adapters: Sequence[Adapter]) -> Iterator[tuple[str, list[Factors]]]:
    """Each module with its factors in every adapter, one module at a time, as float64 takes memory."""
    names = [peft_format.module_names(adapter.tensors) for adapter in adapters]
    for module in names[0]:
        yield module, [_factors(adapter, module, own[module]) for adapter, own in zip(adapters, names, strict=True)]


def _factors(adapter: Adapter, module: str, names: Mapping[str, str]) -> Factors:
    down, up = adapter.tensors[names["down"]].double(), adapter.tensors[names["up"]].double()
    if down.dim() != 2 or up.dim() != 2:
        raise DataError(f"adapter {adapter.label}: {module}: factors of a convolution are not merged")
    scale = _scale(adapter, module, len(down))
    return Factors(down, up, scale, scale * adapter.tensors[names["bias"]].double() if "bias" in names else None)


def _scale(adapter: Adapter, module: str, rank: int) -> float:
    """s of a module; its rank and α may be given by patterns of its name."""
    config = adapter.config
    said, alpha = (
        _patterned(adapter, pattern, module, config.get(plain))
        for pattern, plain in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    if said != rank:
        raise DataError(f"adapter {adapter.label}: {module} has rank {rank}, and its configuration says {said!r:.20}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise DataError(f"adapter {adapter.label}: lora_alpha is {alpha!r:.20}, not a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _patterned(adapter: Adapter, field: str, module: str, otherwise: Any) -> Any:
    patterns = adapter.config.get(field) or {}
    if not isinstance(patterns, Mapping):
        raise DataError(f"adapter {adapter.label}: {field} is {patterns!r:.40}, not an object")
    for pattern, value in patterns.items():
        try:
            match = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise DataError(f"adapter {adapter.label}: {field}: {pattern!r:.40} is no pattern") from error
        if match:
            return value
    return otherwise
