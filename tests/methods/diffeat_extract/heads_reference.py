"""The heads once more, in float64 NumPy, from the formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf
from torch import nn

Array = NDArray[np.float64]
Parameters = Mapping[str, Array]


def parameters(module: nn.Module) -> dict[str, Array]:
    return {name: value.detach().double().numpy() for name, value in module.state_dict().items()}


def part(all_of_them: Parameters, name: str) -> dict[str, Array]:
    """Those whose names begin with `name`, without it."""
    return {key[len(name) + 1 :]: value for key, value in all_of_them.items() if key.startswith(f"{name}.")}


def pooled(maps: Array, side: int) -> Array:
    """Adaptive average: cell i of `side` is the mean of floor(i h / side) to ceil((i + 1) h / side)."""
    height = maps.shape[-1]
    edges = [(cell * height // side, -(-(cell + 1) * height // side)) for cell in range(side)]
    rows = [[maps[..., a:b, c:d].mean((-2, -1)) for c, d in edges] for a, b in edges]
    return np.array(rows).transpose(2, 3, 0, 1)


def normed(x: Array, axes: int | tuple[int, ...], weight: Array, bias: Array) -> Array:
    centred = x - x.mean(axes, keepdims=True)
    result: Array = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-5) * weight + bias
    return result


def tokens(maps: Array, p: Parameters) -> Array:
    """(b, C, h, w) to (b, cells, width)."""
    at_most_16 = pooled(maps, min(16, maps.shape[-1]))
    normal = normed(at_most_16, (1, 2, 3), p["norm.weight"], p["norm.bias"])
    flat = normal.reshape(*normal.shape[:2], -1)
    return np.einsum("oc,bcn->bno", p["convolution.weight"], flat) + p["convolution.bias"]


def block(x: Array, p: Parameters, heads: int = 8) -> Array:
    normal = normed(x, -1, p["norm.weight"], p["norm.bias"])
    width = x.shape[-1]
    size = width // heads
    q, k, v = np.split(normal @ p["queries_keys_values.weight"].T, 3, axis=-1)
    joined = np.empty_like(x)
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        scores = np.exp(q[..., own] @ k[..., own].swapaxes(1, 2) / np.sqrt(size))
        joined[..., own] = scores / scores.sum(-1, keepdims=True) @ v[..., own]
    x = x + joined @ p["projection.weight"].T + p["projection.bias"]
    inner = normed(x, -1, p["mlp.0.weight"], p["mlp.0.bias"]) @ p["mlp.1.weight"].T + p["mlp.1.bias"]
    inner = inner * (1 + erf(inner / np.sqrt(2))) / 2
    result: Array = x + inner @ p["mlp.3.weight"].T + p["mlp.3.bias"]
    return result


def transformer(x: Array, p: Parameters) -> Array:
    x = np.concatenate([np.repeat(p["token"], len(x), axis=0), x], axis=1)
    for number in range(2):
        x = block(x, part(p, f"blocks.{number}"))
    return x[:, 0]


def attention(maps: Array, p: Parameters) -> Array:
    gathered = transformer(tokens(maps, part(p, "tokens")), part(p, "transformer"))
    result: Array = gathered @ p["classifier.weight"].T + p["classifier.bias"]
    return result


def difformer(maps: Sequence[Sequence[Array]], p: Parameters) -> Array:
    """`maps` of every time, of every block."""
    gathered = [
        transformer(
            np.concatenate([tokens(one, part(p, f"tokens.{place}")) for place, one in enumerate(at_time)], axis=1),
            part(p, "transformer"),
        )
        for at_time in maps
    ]
    result: Array = np.concatenate(gathered, axis=1) @ p["classifier.weight"].T + p["classifier.bias"]
    return result


def feedback(maps: Array, p: Parameters, *, training: bool) -> Array:
    """1 x 1 convolution, batch normalisation by the batch or by what is remembered, ReLU."""
    x = np.einsum("oc,bchw->bohw", p["0.weight"][:, :, 0, 0], maps)
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
    else:
        mean, variance = p["1.running_mean"], p["1.running_var"]
    scale = p["1.weight"] / np.sqrt(variance + 1e-5)
    return np.maximum((x - mean[:, None, None]) * scale[:, None, None] + p["1.bias"][:, None, None], 0)
