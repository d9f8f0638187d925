"""The length from which one curve of times stays below another, with an interval from the repeats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Crossover:
    """Where the challenger overtakes.

    Attributes:
        at: the length; None where it does not happen between the shortest and the longest.
        where: "within" the range; "below" it, faster from the shortest on; "beyond" it, slower at the longest.
        low: the interval's ends; None where an end lies outside the range.
        high: see `low`.
    """

    at: float | None
    where: str
    low: float | None
    high: float | None


def crossover(
    lengths: Sequence[int], incumbent: Sequence[Sequence[float]], challenger: Sequence[Sequence[float]], seed: int = 0
) -> Crossover:
    """Where the medians of the challenger's times fall below the incumbent's for good, interpolated in logarithms.

    The interval is a percentile bootstrap (95 %) of the repeats of each length and contender.

    Args:
        lengths: ascending.
        incumbent: the repeats at each length.
        challenger: the repeats at each length.

    Raises:
        ValueError: no lengths, or sequences of unlike length.
    """
    if not lengths or not len(lengths) == len(incumbent) == len(challenger):
        raise ValueError(f"{len(lengths)} lengths, {len(incumbent)} and {len(challenger)} times")
    found = crossing(lengths, [median(x) for x in incumbent], [median(x) for x in challenger])
    random = np.random.default_rng(seed)
    drawn = np.array([_resampled(x, random) for x in (*incumbent, *challenger)])  # (2 lengths, draws)
    half = len(lengths)
    ends = sorted(crossing(lengths, drawn[:half, i].tolist(), drawn[half:, i].tolist()) for i in range(DRAWS))
    tail = (1 - CONFIDENCE) / 2
    low, high = ends[math.floor(tail * (DRAWS - 1))], ends[math.ceil((1 - tail) * (DRAWS - 1))]
    where = "within" if math.isfinite(found) else "below" if found < 0 else "beyond"
    return Crossover(_finite(found), where, _finite(low), _finite(high))


def crossing(lengths: Sequence[int], incumbent: Sequence[float], challenger: Sequence[float]) -> float:
    """Where the last change of sign to the challenger's favour lies; -inf or inf where there is none in the range."""
    lag = [math.log(c / i) for i, c in zip(incumbent, challenger, strict=True)]
    slower = [index for index, value in enumerate(lag) if value >= 0]
    if not slower:
        return -math.inf
    last = slower[-1]
    if last == len(lag) - 1:
        return math.inf
    a, b = math.log(lengths[last]), math.log(lengths[last + 1])
    return math.exp(a + (b - a) * lag[last] / (lag[last] - lag[last + 1]))


def slope(lengths: Sequence[int], times: Sequence[float]) -> float | None:
    """The exponent p of time ~ n**p, by least squares in logarithms; None of fewer than two lengths."""
    if len(lengths) < 2:
        return None
    return float(np.polyfit(np.log(lengths), np.log(times), 1)[0])


def _resampled(times: Sequence[float], random: np.random.Generator) -> NDArray[np.float64]:
    drawn: NDArray[np.float64] = np.median(random.choice(np.asarray(times), size=(DRAWS, len(times))), axis=1)
    return drawn


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
