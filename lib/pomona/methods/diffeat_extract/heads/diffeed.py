"""DifFeed: what the decoder found is fed back to the encoder (arXiv 2311.17921, section 4; released code).

Pass 1 gives decoder blocks b; each goes through a 1 x 1 convolution, batch normalisation and ReLU, and is added to the
output of its mirror, encoder block (total + 1 - b), in pass 2 on the same noisy image. A block of pass 2 feeds an
attention head. The feedback layers and the head learn; the diffusion model is frozen, though gradients pass through it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pomona.errors import UsageError
from pomona.methods.diffeat_extract.heads.modules import Attention, seeded
from pomona.models.unets.blocks import Block
from pomona.models.unets.truncated import Truncated
from pomona.runtime.seeds import derive

TIME = 150
"""Time that the paper reads at."""


@dataclass(frozen=True)
class Feedback:
    """Which decoder blocks feed which encoder blocks back, by number, and which block the head reads.

    Attributes:
        sources: decoder blocks, in the order in which they are computed.
        places: the mirror of each, total + 1 - b.
    """

    sources: tuple[int, ...]
    places: tuple[int, ...]
    head: int


def mirrored(table: Sequence[Block]) -> list[int]:
    """Decoder blocks that mirror the first residual block of each level of the encoder, lowest resolution first.

    Of ADM 256 x 256 they are the paper's 21, 24, 27, 30, 33, 36.
    """
    firsts = [block.number for block in table if re.fullmatch(r"d\d+r0", block.name)]
    return [len(table) + 1 - number for number in reversed(firsts)]


def feedback(table: Sequence[Block], head: int | None = None) -> Feedback:
    """All of the `mirrored` blocks feed back; the head reads one of them, of ADM the paper's 24.

    Args:
        head: the block that the head reads; by default the one a sixth of the levels up.

    Raises:
        UsageError: the head would read a block that not all feedback reaches.
    """
    sources = tuple(mirrored(table))
    places = tuple(len(table) + 1 - number for number in sources)
    chosen = sources[len(sources) // 6] if head is None else head
    if chosen < max(places):
        raise UsageError(
            f"--block {chosen} comes before block {max(places)}, the last that DifFeed feeds back to",
            hint="the middle or a block of the decoder; --list-blocks shows them",
        )
    return Feedback(sources, places, chosen)


class DifFeed(nn.Module):
    """Two passes of a frozen diffusion model with feedback between them, and an attention head.

    Neither pass is a part of this module: its parameters, its state and its mode leave the diffusion model alone. It is
    made where the diffusion model is.

    Args:
        unet: diffusers' own class, frozen from here on.
        table: its blocks.
        time: of the noise in x, in steps.
        width: of the head's tokens; by default the channels of its block.
    """

    def __init__(
        self,
        unet: Any,
        table: Sequence[Block],
        plan: Feedback,
        classes: int,
        *,
        time: int,
        seed: int,
        width: int | None = None,
    ) -> None:
        super().__init__()
        unet.requires_grad_(False)
        self._passes = Truncated(unet, plan.sources), Truncated(unet, [plan.head])  # in a tuple, torch sees no parts
        self.plan, self.time = plan, time
        shapes = {block.number: (block.channels, block.side) for block in table}
        self._sides = [shapes[place][1] for place in plan.places]
        with seeded(derive(seed, "feedback")):
            self.feedback = nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(shapes[source][0], shapes[place][0], 1, bias=False),
                    nn.BatchNorm2d(shapes[place][0]),
                    nn.ReLU(),
                )
                for source, place in zip(plan.sources, plan.places, strict=True)
            )
        self.head = Attention(*shapes[plan.head], classes, seed=derive(seed, "head"), width=width)
        self.to(unet.device)

    def first(self, noisy: Tensor) -> tuple[Tensor, ...]:
        """The maps that feed back; they depend on nothing that learns, so they may be kept over the epochs."""
        maps: tuple[Tensor, ...] = self._passes[0](noisy, self._times(noisy))
        return maps

    def forward(self, noisy: Tensor, *kept: Tensor) -> Tensor:
        """Noisy images (b, C, H, W) to logits (b, classes); `kept` is what `first` gives of them, if it is at hand."""
        own, frozen = (next(module.parameters()).dtype for module in (self.head, self._passes[1]))
        additions = {
            place: _resized(layers(maps.to(own)), side).to(frozen)
            for place, side, layers, maps in zip(
                self.plan.places, self._sides, self.feedback, kept or self.first(noisy), strict=True
            )
        }
        (maps,) = self._passes[1](noisy, self._times(noisy), additions)
        logits: Tensor = self.head(maps.to(own))
        return logits

    def _times(self, noisy: Tensor) -> Tensor:
        return torch.full((len(noisy),), self.time, device=noisy.device)


def _resized(maps: Tensor, side: int) -> Tensor:
    if maps.shape[-1] == side:
        return maps
    return functional.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
