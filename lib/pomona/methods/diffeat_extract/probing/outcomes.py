"""What right and wrong answers of a probe come to, with intervals of 95 %."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pomona.report.intervals import wilson
from pomona.runtime.seeds import derive

_RESAMPLES = 4_000
_ENDS = (0.025, 0.975)


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers.

    Attributes:
        mean: over all draws and test images.
        deviation: standard deviation (n - 1) of the draws' accuracies; None of one draw.
        low, high: the interval.
        draws, tests: how many draws of labelled images, and test images of each.
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
    """Mean and interval of answers `correct` (draws, tests), all on the same test images.

    Wilson's interval of one draw. Of several, draws and test images are both resampled, independently, as another
    experiment would have other ones of each, and the percentiles are the interval: the pigeonhole bootstrap (Owen
    2007), which errs towards wide. Of few draws it would fall short: one less than there are is drawn (Rao and Wu
    1988). Where all answers are right, or all wrong, a bootstrap sees no doubt, and Wilson's interval stands.

    Raises:
        ValueError: there are no answers.
    """
    answers = _matrix(correct)
    count, tests = answers.shape
    mean = float(answers.mean())
    by_draw = answers.mean(axis=1)
    if count == 1 or answers.min() == answers.max():
        low, high = wilson(mean * tests, tests)
    else:
        low, high = _resampled(answers, seed)
    return Accuracy(mean, float(by_draw.std(ddof=1)) if count > 1 else None, low, high, count, tests)


def difference(ours: ArrayLike, theirs: ArrayLike, *, seed: int) -> Difference:
    """Accuracy of `ours` minus that of `theirs`, both (draws, tests), answer by answer: same draws, same test images.

    The interval is as in `accuracy`, of one draw too. Where no answer differs, it is as wide as no difference in as
    many test images leaves it (Wilson).

    Raises:
        ValueError: there are no answers, or not as many on both sides.
    """
    first, second = _matrix(ours), _matrix(theirs)
    if first.shape != second.shape:
        raise ValueError(f"answers of shape {first.shape} beside {second.shape}")
    differences = first - second
    mean = float(differences.mean())
    if differences.min() == differences.max():
        room = wilson(0, differences.shape[1])[1]
        return Difference(mean, max(-1.0, mean - room), min(1.0, mean + room))
    return Difference(mean, *_resampled(differences, seed))


def _matrix(correct: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(correct, dtype=np.float64)
    if found.ndim != 2 or not found.size:
        raise ValueError(f"answers of shape {found.shape}; expected (draws, tests)")
    return found


def _resampled(values: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Percentiles of the mean of `values` (draws, tests), rows and columns resampled.

    Columns that are alike are drawn together, by how many there are of each kind: the same distribution, sooner.
    """
    count, tests = values.shape
    kinds, sizes = np.unique(values, axis=1, return_counts=True)
    random = np.random.Generator(np.random.Philox(derive(seed, "probe/bootstrap")))
    columns = random.multinomial(tests, sizes / tests, size=_RESAMPLES) / tests
    drawn = max(1, count - 1)
    rows = random.multinomial(drawn, np.full(count, 1 / count), size=_RESAMPLES) / drawn
    means = np.einsum("rd,dk,rk->r", rows, kinds, columns, optimize=True)
    low, high = np.quantile(means, _ENDS)
    return float(low), float(high)
