"""The part of a U-Net that the blocks asked for need: nothing after the last of them is computed, or held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pomona.models.unets.stages import Embedding, stages


class Truncated(nn.Module):
    """Maps of some blocks of a U-Net, from one pass that ends at the last of them.

    It shares its modules with the U-Net, and is always in evaluation mode, also within a module that is in training.
    Its outputs are the very numbers that the U-Net computes. `torch.compile` makes one graph of it.

    Attributes:
        numbers: of the blocks whose maps `forward` returns, from 1 (`pomona.models.unets.blocks`).
    """

    def __init__(self, module: Any, numbers: Sequence[int]) -> None:
        """
        Args:
            module: diffusers' `UNet2DModel` or `UNet2DConditionModel`.
            numbers: blocks in any order; one may be named twice.

        Raises:
            DataError: the U-Net cannot be taken apart into blocks.
            ValueError: there are no such blocks.
        """
        super().__init__()
        found = stages(module)
        if not numbers or min(numbers) < 1 or max(numbers) > len(found):
            raise ValueError(f"blocks {list(numbers)} of a U-Net with {len(found)}")
        self.numbers = tuple(numbers)
        run = found[: max(numbers)]
        self.stages = nn.ModuleList(run)
        self.embedding = Embedding(module) if len(run) > 1 else None
        self._centred = bool(module.config.center_input_sample)
        # The decoder takes up the encoder's maps from the last one backwards; the others need not be held.
        encoder = sum(stage.side == "encoder" for stage in run)
        self._held = range(encoder - sum(stage.side == "decoder" for stage in run) + 1, encoder + 1)
        self.eval()

    def train(self, mode: bool = True) -> Truncated:
        """Evaluation mode, whatever `mode` is: what is read is frozen."""
        return super().train(False)

    def forward(self, x: Tensor, t: Tensor, additions: Mapping[int, Tensor] | None = None) -> tuple[Tensor, ...]:
        """
        Args:
            x: noisy images (B, C, H, W); they are converted to the number format of the network.
            t: their times (B,), as they are given to the U-Net: Fourier embeddings take the logarithm, so 0 gives NaN.
            additions: what to add to the outputs of blocks, by number, before they are returned, passed on and kept for
                the decoder (feedback of DifFeed, arXiv 2311.17921, released code).

        Returns:
            The maps (B, channels, side, side) of `numbers`, in that order.

        Raises:
            ValueError: an addition is for a block that is not computed.
        """
        added = additions or {}
        if beyond := [number for number in added if not 1 <= number <= len(self.stages)]:
            raise ValueError(f"block {beyond[0]} is not among the {len(self.stages)} that are computed")
        dtype = self.stages[0].parts[0].weight.dtype  # type: ignore[index, union-attr]
        x = x.to(dtype)
        if self._centred:
            x = 2 * x - 1.0
        time, condition = (None, None) if self.embedding is None else self.embedding(t, dtype)
        image = x
        held: list[Tensor] = []
        maps: dict[int, Tensor] = {}
        for number, stage in enumerate(self.stages, start=1):
            if stage.side == "decoder":
                x = torch.cat([x, held.pop()], dim=1)
            x, image = stage(x, image, time, condition)
            if number in added:
                x = x + added[number]
            if number in self._held:
                held.append(x)
            if number in self.numbers:
                maps[number] = x
        return tuple(maps[number] for number in self.numbers)
