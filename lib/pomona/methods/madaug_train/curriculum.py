"""When: how likely an image is to be augmented at a moment of training."""

from __future__ import annotations

import math


def probability(epoch: float, tau: float, floor: float = 0.0) -> float:
    """``min(tanh(epoch / tau) + floor, 1)``; 1 where `tau` is 0: no curriculum.

    Args:
        epoch: from 0.
        tau: time constant in epochs.
        floor: what the released code adds, 0.01; the paper adds nothing.
    """
    return min(math.tanh(epoch / tau) + floor, 1.0) if tau else 1.0
