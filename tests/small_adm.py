"""ADM (Dhariwal & Nichol 2021) in float64 as its paper and model card describe it, under guided-diffusion's names.

Weights come into being when a layer first asks for them, so their names and shapes are those of this file and not
those of the converter under test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    """ADM-256 has widths (256, 256, 512, 512, 1024, 1024), attention at the last three, heads of 64 and 256 pixels."""

    widths: tuple[int, ...] = (32, 32, 64, 64)
    attends: tuple[bool, ...] = (False, False, True, True)
    layers: int = 2
    head: int = 16
    side: int = 16

    def config(self, full: dict[str, Any]) -> dict[str, Any]:
        """The `UNet2DModel` of these sizes that is otherwise as `full`."""
        down = ["AttnDownBlock2D" if attends else "ResnetDownsampleBlock2D" for attends in self.attends]
        up = ["AttnUpBlock2D" if attends else "ResnetUpsampleBlock2D" for attends in reversed(self.attends)]
        return full | {
            "sample_size": self.side,
            "block_out_channels": list(self.widths),
            "layers_per_block": self.layers,
            "down_block_types": down,
            "up_block_types": up,
            "attention_head_dim": self.head,
        }


@dataclass
class Weights:
    """float32, none of them zero, from a seed."""

    generator: torch.Generator
    state: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, name: str, *shape: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the layer `name`, float64; a weight of one axis is the scale of a norm."""
        if f"{name}.weight" not in self.state:
            drawn = torch.randn(shape, generator=self.generator)
            weight = 1 + 0.2 * drawn if len(shape) == 1 else drawn / math.sqrt(math.prod(shape[1:]))
            self.state[f"{name}.weight"] = weight
            self.state[f"{name}.bias"] = 0.2 * torch.randn(shape[:1], generator=self.generator)
        return self.state[f"{name}.weight"].double(), self.state[f"{name}.bias"].double()


def weights(seed: int = 0) -> Weights:
    return Weights(torch.Generator().manual_seed(seed))


def adm(weights: Weights, x: Tensor, t: Tensor, sizes: Sizes) -> tuple[list[Tensor], Tensor]:
    """The output of every block, in the order in which they run, and the six channels that the model gives.

    Args:
        x: (B, 3, side, side), float64.
        t: (B,), float64.
    """
    half = sizes.widths[0] // 2
    angles = t[:, None] * 10_000 ** (-torch.arange(half, dtype=torch.float64) / half)
    time = torch.cat([angles.cos(), angles.sin()], 1)
    for place in (0, 2):
        matrix, bias = weights(f"time_embed.{place}", 4 * sizes.widths[0], time.shape[1])
        time = (time if place == 0 else _silu(time)) @ matrix.T + bias
    h = F.conv2d(x, *weights("input_blocks.0.0", sizes.widths[0], 3, 3, 3), padding=1)
    blocks = [h]
    for level, width in enumerate(sizes.widths):
        if level > 0:
            h = _residual(weights, f"input_blocks.{len(blocks)}.0", h, time, h.shape[1], "down")
            blocks.append(h)
        for _ in range(sizes.layers):
            h = _residual(weights, f"input_blocks.{len(blocks)}.0", h, time, width)
            if sizes.attends[level]:
                h = _attention(weights, f"input_blocks.{len(blocks)}.1", h, sizes.head)
            blocks.append(h)
    skips = list(blocks)
    h = _residual(weights, "middle_block.0", h, time, h.shape[1])
    h = _attention(weights, "middle_block.1", h, sizes.head)
    h = _residual(weights, "middle_block.2", h, time, h.shape[1])
    blocks.append(h)
    number = 0
    for level in range(len(sizes.widths) - 1, -1, -1):
        for layer in range(sizes.layers + 1):
            joined = torch.cat([h, skips.pop()], 1)
            h = _residual(weights, f"output_blocks.{number}.0", joined, time, sizes.widths[level])
            if sizes.attends[level]:
                h = _attention(weights, f"output_blocks.{number}.1", h, sizes.head)
            if layer == sizes.layers and level > 0:
                place = 2 if sizes.attends[level] else 1
                h = _residual(weights, f"output_blocks.{number}.{place}", h, time, h.shape[1], "up")
            blocks.append(h)
            number += 1
    h = _silu(_norm(h, *weights("out.0", h.shape[1])))
    return blocks, F.conv2d(h, *weights("out.2", 6, h.shape[1], 3, 3), padding=1)


def _residual(weights: Weights, name: str, x: Tensor, time: Tensor, width: int, resize: str = "") -> Tensor:
    """Norm, SiLU, resize, 3x3; norm scaled and shifted by the time, SiLU, 3x3; plus the input, resized as well."""
    h = _silu(_norm(x, *weights(f"{name}.in_layers.0", x.shape[1])))
    h, x = _resized(h, resize), _resized(x, resize)
    h = F.conv2d(h, *weights(f"{name}.in_layers.2", width, x.shape[1], 3, 3), padding=1)
    matrix, bias = weights(f"{name}.emb_layers.1", 2 * width, time.shape[1])
    scale_and_shift = (_silu(time) @ matrix.T + bias)[:, :, None, None]
    h = _norm(h, *weights(f"{name}.out_layers.0", width))
    h = _silu(h * (1 + scale_and_shift[:, :width]) + scale_and_shift[:, width:])
    h = F.conv2d(h, *weights(f"{name}.out_layers.3", width, width, 3, 3), padding=1)
    if x.shape[1] != width:
        x = F.conv2d(x, *weights(f"{name}.skip_connection", width, x.shape[1], 1, 1))
    return x + h


def _attention(weights: Weights, name: str, x: Tensor, head: int) -> Tensor:
    """Heads one by one; of the 3 C rows of qkv, those of a head stand together: its queries, its keys, its values."""
    width = x.shape[1]
    tokens = _norm(x, *weights(f"{name}.norm", width)).flatten(2)
    matrix, bias = weights(f"{name}.qkv", 3 * width, width, 1)
    rows = matrix[:, :, 0] @ tokens + bias[:, None]
    seen = []
    for first in range(0, 3 * width, 3 * head):
        query, key, value = (rows[:, first + part * head : first + (part + 1) * head] for part in range(3))
        likeness = (query.transpose(1, 2) @ key / math.sqrt(head)).exp()
        seen.append(value @ (likeness / likeness.sum(-1, keepdim=True)).transpose(1, 2))
    matrix, bias = weights(f"{name}.proj_out", width, width, 1)
    return x + (matrix[:, :, 0] @ torch.cat(seen, 1) + bias[:, None]).reshape(x.shape)


def _norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    groups = x.reshape(len(x), 32, -1)
    groups = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return groups.reshape(x.shape) * scale[:, None, None] + shift[:, None, None]


def _resized(x: Tensor, resize: str) -> Tensor:
    if resize == "down":
        return (x[..., ::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, ::2] + x[..., 1::2, 1::2]) / 4
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if resize == "up" else x


def _silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())
