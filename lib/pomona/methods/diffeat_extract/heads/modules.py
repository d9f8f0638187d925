"""The heads of the first paper: linear, multi-layer perceptron, attention (arXiv 2307.08702, section 3; released code).

Each is a function of what its block gives, so the caller pools and keeps; nothing is normalised before the linear ones.
Parameters begin as torch begins them, drawn from a seed of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

GRID = 16
"""The side to which maps are pooled for attention; smaller ones stay as they are."""
HEADS = 8
BLOCKS = 2
_EXPANSION = 4


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Parameters made inside the block are drawn from `seed`; torch's own generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def linear(dims: int, classes: int, *, seed: int) -> nn.Module:
    """(b, dims), or maps with as many numbers, to logits (b, classes)."""
    return mlp(dims, (), classes, seed=seed)


def mlp(dims: int, hidden: Sequence[int], classes: int, *, seed: int) -> nn.Module:
    """(b, dims), or maps with as many numbers, to logits (b, classes), with ReLU after each of the `hidden` widths."""
    layers: list[nn.Module] = [nn.Flatten()]
    with seeded(seed):
        for before, after in zip((dims, *hidden), hidden, strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
        layers.append(nn.Linear(hidden[-1] if hidden else dims, classes))
    return nn.Sequential(*layers)


def width_for(channels: Sequence[int]) -> int:
    """Width of the tokens made of blocks with these `channels`: that of the widest, made divisible by the `HEADS`.

    Of the papers' blocks that is 1,024, as the released code has it everywhere.
    """
    return -(-max(channels) // HEADS) * HEADS


class Tokens(nn.Module):
    """Maps to tokens, one for each cell: pool to 16 x 16, LayerNorm over (C, 16, 16), 1 x 1 convolution.

    Args:
        channels, side: C and the side of the maps, as the block gives them or pooled already.
    """

    def __init__(self, channels: int, side: int, width: int) -> None:
        super().__init__()
        self.side = min(side, GRID)
        self.norm = nn.LayerNorm((channels, self.side, self.side))
        self.convolution = nn.Linear(channels, width)

    def forward(self, maps: Tensor) -> Tensor:
        """(b, C, h, w) to (b, cells, width)."""
        if maps.shape[-1] != self.side:
            maps = functional.adaptive_avg_pool2d(maps, self.side)
        normal: Tensor = self.norm(maps)
        tokens: Tensor = self.convolution(normal.flatten(2).transpose(1, 2))
        return tokens


class Block(nn.Module):
    """A pre-norm transformer block: attention of 8 heads without bias of queries, keys and values, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, _EXPANSION * width), nn.GELU(), nn.Linear(_EXPANSION * width, width)
        )

    def forward(self, tokens: Tensor, wanted: int | None = None) -> Tensor:
        """(b, n, width) to (b, wanted, width): the first `wanted` tokens, by default all."""
        width = tokens.shape[-1]
        normal: Tensor = self.norm(tokens)
        asking = normal[:, :wanted]
        weight = self.queries_keys_values.weight
        queries = functional.linear(asking, weight[:width])
        keys, values = functional.linear(normal, weight[width:]).chunk(2, dim=-1)
        q, k, v = (part.reshape(*part.shape[:2], HEADS, -1).transpose(1, 2) for part in (queries, keys, values))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        states: Tensor = tokens[:, :wanted] + self.projection(attended)
        states = states + self.mlp(states)
        return states


class Transformer(nn.Module):
    """What a class token, zero at first, gathers from tokens without positions in two blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(BLOCKS))

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, n, width) to (b, width). Of the last block the class token alone is computed."""
        states = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.blocks[:-1]:
            states = block(states)
        gathered: Tensor = self.blocks[-1](states, wanted=1)
        return gathered[:, 0]


class Attention(nn.Module):
    """The attention head: tokens of one map, two blocks, and the class token's state to logits.

    Args:
        channels, side: of the maps, as the block gives them or pooled already.
        width: of the tokens; by default `width_for` the channels.
    """

    def __init__(self, channels: int, side: int, classes: int, *, seed: int, width: int | None = None) -> None:
        super().__init__()
        inner = width or width_for([channels])
        with seeded(seed):
            self.tokens = Tokens(channels, side, inner)
            self.transformer = Transformer(inner)
            self.classifier = nn.Linear(inner, classes)

    def forward(self, maps: Tensor) -> Tensor:
        """(b, C, h, w) to logits (b, classes)."""
        logits: Tensor = self.classifier(self.transformer(self.tokens(maps)))
        return logits
