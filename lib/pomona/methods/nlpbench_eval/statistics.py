"""What a count of right answers says of a model: intervals, paired tests, agreement, power.

Intervals are two-sided. Nothing here returns NaN or an infinity: what is undefined is None.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pomona.report.intervals import two_sided, wilson

SMALL = 20
"""Cells with fewer items say next to nothing: 3 of 3 is anything above 0.44."""

DRAWS = 10_000
_CHUNK = 1 << 15  # drawn clusters held at once: what fits a processor's cache is drawn several times faster


@dataclass(frozen=True, slots=True)
class Cell:
    """`k` right answers among `n` items."""

    k: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.k <= self.n:
            raise ValueError(f"{self.k} right answers among {self.n} items")

    @property
    def value(self) -> float | None:
        """Accuracy; None of no items."""
        return self.k / self.n if self.n else None

    @property
    def low(self) -> float:
        return wilson(self.k, self.n)[0]

    @property
    def high(self) -> float:
        return wilson(self.k, self.n)[1]

    @property
    def small(self) -> bool:
        return self.n < SMALL

    def as_dict(self) -> dict[str, Any]:
        """The cell as result.json has it, without an interval where there are no items."""
        ends = (self.low, self.high) if self.n else (None, None)
        return {"k": self.k, "n": self.n, "value": self.value, "low": ends[0], "high": ends[1], "small": self.small}


def mcnemar(b: int, c: int) -> tuple[float, float]:
    """Two-sided p-values of McNemar's test: exact, and mid-p (less conservative: the observed split counts half).

    Args:
        b: items only the first got right.
        c: items only the second got right.
    """
    n, fewer = b + c, min(b, c)
    if b == c:
        return 1.0, 1.0
    term = tail = 1  # C(n, i) and its sum, in integers: no rounding until the end
    for i in range(fewer):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n), (2 * tail - term) / 2**n


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the order given."""
    adjusted, least = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = least
    return adjusted


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable],
    draws: int = DRAWS,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Mean of `first` minus mean of `second` over the same items, with its percentile interval.

    Whole clusters are resampled: questions on one context stand or fall together.

    Raises:
        ValueError: no items, or sequences of unlike length.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} first scores, {len(second)} second")
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    low, high = cluster_bootstrap(differences, clusters, draws, seed, confidence)
    return float(differences.mean()), low, high


def cluster_bootstrap(
    values: ArrayLike, clusters: Sequence[Hashable], draws: int = DRAWS, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """The percentile interval of the mean of `values` when whole clusters are resampled.

    Raises:
        ValueError: no items, or sequences of unlike length.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers) or len(numbers) != len(clusters):
        raise ValueError(f"{len(numbers)} values in {len(clusters)} places of clusters")
    means = _resampled_means(numbers, clusters, draws, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _resampled_means(
    values: NDArray[np.float64], clusters: Sequence[Hashable], draws: int, random: np.random.Generator
) -> NDArray[np.float64]:
    places: dict[Hashable, int] = {}
    membership = np.array([places.setdefault(cluster, len(places)) for cluster in clusters])
    sums, sizes = np.bincount(membership, weights=values), np.bincount(membership)
    means = np.empty(draws)
    rows = max(1, _CHUNK // len(sums))
    for start in range(0, draws, rows):
        drawn = random.integers(len(sums), size=(min(rows, draws - start), len(sums)))
        means[start : start + rows] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return means


# --- Judges ----------------------------------------------------------------------------------------------------------


def agreement(x: Sequence[Hashable], y: Sequence[Hashable]) -> float | None:
    """The share of items that two raters label alike; None of no items."""
    pairs = list(zip(x, y, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


def cohen_kappa(x: Sequence[Hashable], y: Sequence[Hashable]) -> float | None:
    """Agreement beyond chance (Cohen 1960); None where chance alone gives full agreement, or of no items."""
    pairs = Counter(zip(x, y, strict=True))
    n = pairs.total()
    first, second = Counter(x), Counter(y)
    alike = sum(count for (a, b), count in pairs.items() if a == b)
    chance = sum(count * second[label] for label, count in first.items())  # n² times the expected share
    return (n * alike - chance) / (n * n - chance) if chance < n * n else None


@dataclass(frozen=True, slots=True)
class Calibration:
    """A judge's verdicts on answers that people labelled.

    Attributes:
        sensitivity: of the answers people call right, those the judge calls right.
        specificity: of the answers people call wrong, those the judge calls wrong.
    """

    sensitivity: Cell
    specificity: Cell

    @classmethod
    def of(cls, judge: Sequence[bool], human: Sequence[bool]) -> Calibration:
        """Raises ValueError on sequences of unlike length."""
        pairs = Counter(zip(map(bool, judge), map(bool, human), strict=True))
        right, wrong = pairs[True, True], pairs[False, False]
        return cls(Cell(right, right + pairs[False, True]), Cell(wrong, wrong + pairs[True, False]))


def corrected_accuracy(
    observed: Cell, calibration: Calibration, confidence: float = 0.95
) -> tuple[float, float, float] | None:
    """The accuracy people would have found, from a judge's count and its error rates, with an interval.

    The estimate is Rogan and Gladen's (1978), (q + sp - 1) / (se + sp - 1), clipped to [0, 1]. The interval is Lang and
    Reiczigel's (2014): the delta method on counts shrunk towards one half, with their shift, so that it holds its level
    with a calibration set of tens and rates near one.

    Returns:
        estimate, low, high; None where the judge is no better than chance or was never calibrated on both kinds.
    """
    se, sp, q = calibration.sensitivity, calibration.specificity, observed.value
    if q is None or se.value is None or sp.value is None or se.value + sp.value <= 1:
        return None
    estimate = (q + sp.value - 1) / (se.value + sp.value - 1)
    z = two_sided(confidence)
    n = observed.n + z * z
    q = (observed.k + z * z / 2) / n
    (se_rate, se_n), (sp_rate, sp_n) = (((cell.k + 1) / (cell.n + 2), cell.n + 2) for cell in (se, sp))
    youden = se_rate + sp_rate - 1
    centre = (q + sp_rate - 1) / youden
    se_error, sp_error = se_rate * (1 - se_rate) / se_n, sp_rate * (1 - sp_rate) / sp_n
    shift = 2 * z * z * (centre * se_error - (1 - centre) * sp_error)
    half = z / youden * math.sqrt(q * (1 - q) / n + centre**2 * se_error + (1 - centre) ** 2 * sp_error)
    low, high = centre + shift - half, centre + shift + half
    # The counts are shrunk, so the interval of a perfect score may end below it.
    estimate = _clip(estimate)
    return estimate, min(estimate, _clip(low)), max(estimate, _clip(high))


# --- Power -----------------------------------------------------------------------------------------------------------


def detectable_difference(n: int, rate: float = 0.5, power: float = 0.8, confidence: float = 0.95) -> float:
    """The least true difference of two accuracies near `rate`, on `n` items each, found with this power (unpaired)."""
    return _detectable(2 * rate * (1 - rate), n, power, confidence)


def detectable_paired_difference(
    n: int, discordance: float = 0.2, power: float = 0.8, confidence: float = 0.95
) -> float:
    """The same for two runs over the same `n` items that disagree on the share `discordance` of them."""
    return _detectable(discordance, n, power, confidence)


def _detectable(variance: float, n: int, power: float, confidence: float) -> float:
    return (two_sided(confidence) + NormalDist().inv_cdf(power)) * math.sqrt(variance / n)


# --- Several samples of one question ---------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of `k` samples is right, estimated without bias from `c` right of `n` (Chen et al. 2021).

    Raises:
        ValueError: `k` exceeds `n`.
    """
    if not 0 < k <= n:
        raise ValueError(f"{k} of {n} samples")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_at_k(votes: Sequence[Hashable], gold: Hashable, k: int) -> float:
    """The chance that the most frequent of `k` answers is `gold`, exactly, over all ways to draw `k` of `votes`.

    None is an abstention. Ties go to the first seen, which is any of the tied with equal chance.

    Raises:
        ValueError: `k` exceeds the number of votes.
    """
    if not 0 < k <= len(votes):
        raise ValueError(f"{k} of {len(votes)} samples")
    counts = Counter(votes)
    abstained, right = counts.pop(None, 0), counts.pop(gold, 0)
    won = 0.0
    for most in range(1, min(right, k) + 1):
        # ways[tied, drawn]: choices of the other answers, none above `most`, `tied` of them at it
        ways = Counter({(0, drawn): math.comb(abstained, drawn) for drawn in range(k - most + 1)})
        for count in counts.values():
            longer: Counter[tuple[int, int]] = Counter()
            for (tied, drawn), way in ways.items():
                for more in range(min(count, most, k - most - drawn) + 1):
                    longer[tied + (more == most), drawn + more] += way * math.comb(count, more)
            ways = longer
        for (tied, drawn), way in ways.items():
            if drawn == k - most:
                won += math.comb(right, most) * way / (1 + tied) / math.comb(len(votes), k)
    return won


def _clip(share: float) -> float:
    return min(1.0, max(0.0, share))
