"""Intervals of proportions."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson(k: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a proportion k / n (Wilson 1927); (0, 1) of no items."""
    if n == 0:
        return 0.0, 1.0
    z = two_sided(confidence)
    share, weight = k / n, n / (n + z * z)
    centre = weight * share + (1 - weight) / 2
    half = weight * z / n * math.sqrt(n * share * (1 - share) + z * z / 4)
    # Rounding must not push an end off 0 or 1, where it lies exactly.
    return (0.0 if k == 0 else max(0.0, centre - half)), (1.0 if k == n else min(1.0, centre + half))


def two_sided(confidence: float) -> float:
    """How many standard deviations either side of its mean hold this share of a normal distribution."""
    return NormalDist().inv_cdf((1 + confidence) / 2)
