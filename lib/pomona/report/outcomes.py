"""What right and wrong answers come to, with intervals of 95 %.

Answers are (draws, tests): a draw is of what is learned from, as a seed makes it, and each may be tested on other
images than the next; NaN is an image that a draw is not tested on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pomona.report.intervals import wilson
from pomona.runtime.seeds import derive

_RESAMPLES = 4_000
_ENDS = (0.025, 0.975)
_NONE = 9.0  # in place of NaN, which equals nothing


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers.

    Attributes:
        mean: over all answers.
        deviation: standard deviation (n - 1) of the draws' accuracies; None of one draw.
        low, high: the interval.
        draws, tests: how many draws, and test images of each, or of the one that has fewest.
    """

    mean: float
    deviation: float | None
    low: float
    high: float
    draws: int
    tests: int


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs, in accuracy, with its interval."""

    mean: float
    low: float
    high: float


def accuracy(correct: ArrayLike, *, seed: int) -> Accuracy:
    """Mean and interval of answers `correct`, (draws, tests).

    Wilson's interval of one draw. Of several, draws and test images are both resampled, independently, as another
    experiment would have other ones of each, and the percentiles are the interval: the pigeonhole bootstrap (Owen
    2007), which errs towards wide. Of few draws it would fall short: one less than there are is drawn (Rao and Wu
    1988). Where all answers are right, or all wrong, a bootstrap sees no doubt, and Wilson's interval stands.

    Raises:
        ValueError: there are no answers.
    """
    answers = _matrix(correct)
    count, tests = len(answers), _tests(answers)
    mean = float(np.nanmean(answers))
    by_draw = np.nanmean(answers, axis=1)
    if count == 1 or np.nanmin(answers) == np.nanmax(answers):
        low, high = wilson(mean * tests, tests)
    else:
        low, high = _resampled(answers, seed)
    return Accuracy(mean, float(by_draw.std(ddof=1)) if count > 1 else None, low, high, count, tests)


def difference(ours: ArrayLike, theirs: ArrayLike, *, seed: int) -> Difference:
    """Accuracy of `ours` minus that of `theirs`, both (draws, tests), answer by answer: same draws, same test images.

    The interval is as in `accuracy`, of one draw too. Where no answer differs, it is as wide as no difference in as
    many test images leaves it (Wilson).

    Raises:
        ValueError: there are no answers, or not the same draws and test images on both sides.
    """
    first, second = _matrix(ours), _matrix(theirs)
    if first.shape != second.shape or (np.isnan(first) != np.isnan(second)).any():
        raise ValueError(f"answers of shape {first.shape} beside {second.shape}, or not of the same images")
    differences = first - second
    mean = float(np.nanmean(differences))
    if np.nanmin(differences) == np.nanmax(differences):
        room = wilson(0, _tests(differences))[1]
        return Difference(mean, max(-1.0, mean - room), min(1.0, mean + room))
    return Difference(mean, *_resampled(differences, seed))


def _matrix(correct: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(correct, dtype=np.float64)
    if found.ndim != 2 or not found.size or np.isnan(found).all(axis=1).any():
        raise ValueError(f"answers of shape {found.shape}; expected (draws, tests), some of each draw")
    return found


def _tests(answers: NDArray[np.float64]) -> int:
    return int((~np.isnan(answers)).sum(axis=1).min())


def _resampled(values: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Percentiles of the mean of `values` (draws, tests), rows and columns resampled.

    Columns that are alike are drawn together, by how many there are of each kind: the same distribution, sooner. A
    resample is the mean of those values in it that are there.
    """
    missing = np.isnan(values)
    count, tests = values.shape
    kinds, sizes = np.unique(np.where(missing, _NONE, values), axis=1, return_counts=True)
    random = np.random.Generator(np.random.Philox(derive(seed, "probe/bootstrap")))
    columns = random.multinomial(tests, sizes / tests, size=_RESAMPLES) / tests
    drawn = max(1, count - 1)
    rows = random.multinomial(drawn, np.full(count, 1 / count), size=_RESAMPLES) / drawn

    def resampled(kinds: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.einsum("rd,dk,rk->r", rows, kinds, columns, optimize=True)
        return found

    if missing.any():
        there = resampled(np.where(kinds == _NONE, 0.0, 1.0))
        means = resampled(np.where(kinds == _NONE, 0.0, kinds))[there > 0] / there[there > 0]
    else:
        means = resampled(kinds)
    low, high = np.quantile(means, _ENDS)
    return float(low), float(high)
