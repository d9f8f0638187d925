"""DifFormer: tokens of several blocks and times attend to one another (arXiv 2311.17921, section 4; released code)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pomona.methods.diffeat_extract.heads.diffeed import mirrored
from pomona.methods.diffeat_extract.heads.modules import Tokens, Transformer, seeded, width_for
from pomona.models.unets.blocks import Block

TIMES = (90, 150, 300)
"""Times that the paper reads at."""


def blocks_to_read(table: Sequence[Block]) -> list[int]:
    """The middle, if there is one, and of the `mirrored` blocks those a sixth and half of the levels up.

    Of ADM 256 x 256 they are the paper's 19, 24, 30.
    """
    decoder = mirrored(table)
    middle = [block.number for block in table if block.name == "mid"]
    return [*middle, *sorted({decoder[len(decoder) // 6], decoder[len(decoder) // 2]})]


class DifFormer(nn.Module):
    """Tokens of all blocks at one time go through one transformer; the class tokens of all times to logits.

    A block's tokenizer and the transformer are the same at all times. Times do not attend to one another: their class
    tokens meet in the linear map.

    Args:
        shapes: (channels, side) of every block's maps, as the block gives them or pooled already.
        times: how many.
        width: of the tokens; by default `width_for` the channels.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], times: int, classes: int, *, seed: int, width: int | None = None
    ) -> None:
        super().__init__()
        inner = width or width_for([channels for channels, _ in shapes])
        with seeded(seed):
            self.tokens = nn.ModuleList(Tokens(channels, side, inner) for channels, side in shapes)
            self.transformer = Transformer(inner)
            self.classifier = nn.Linear(times * inner, classes)
        self.times = times

    def forward(self, *maps: Tensor) -> Tensor:
        """Maps (b, C, h, w) to logits (b, classes): those of all blocks at the first time, then at the second, ..."""
        count = len(self.tokens)
        tokens = [  # the times of a block along the batch
            tokens(torch.cat(maps[place::count])) for place, tokens in enumerate(self.tokens)
        ]
        gathered: Tensor = self.transformer(torch.cat(tokens, dim=1))
        logits: Tensor = self.classifier(torch.cat(gathered.chunk(self.times), dim=1))
        return logits
