"""How many images are worked on at once, and what is brought to where they are."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Levels: on a CPU what lies between two steps then stays in its cache. All 17 operations on 16 images of 224 pixels
# took 130 ms without blocks and 40 ms with blocks of 2^14 to 2^20; at 32 pixels 2^17 to 2^19 were fastest.
_AT_ONCE = 1 << 18


def block(images: Tensor) -> int:
    """Images (n, ...) to work on at once: all of them where they are not on a CPU."""
    if images.device.type != "cpu":
        return max(1, len(images))
    return max(1, _AT_ONCE // images.shape[1:].numel())


@lru_cache(16)
def axes(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The columns (W,) and the rows (H, 1), int32."""
    across = torch.arange(width, dtype=torch.int32, device=device)
    return across, torch.arange(height, dtype=torch.int32, device=device)[:, None]


def beside(images: Tensor, numbers: NDArray[np.generic]) -> Tensor:
    """The numbers on the device of the images."""
    # Not waited for: what is not page-locked has been read when the call returns.
    return torch.from_numpy(numbers).to(images.device, non_blocking=True)
