"""What the separation should come to, without drawing anything.

Two accounts. To leading order: attention f* to the special token, the hit rate p1 of one sign vector on D1 and its
false alarm p0 on D0, and where they change. Exactly: <c, y> depends on y through three signs and the number of +1 among
the other d - 3, so every probability is a finite sum over 8 (d - 2) cases (`Lattice`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pomona.methods.attn_compare.kernels import Kernel
from pomona.methods.attn_compare.separation.constants import GAP, Constants
from pomona.methods.attn_compare.separation.construction import Outputs, fires
from pomona.methods.attn_compare.separation.signs import Floats, Kinds

# --- To leading order ------------------------------------------------------------------------------------------------


def weight_on_special(ratio: float, n: int) -> float:
    """f* = w_ss / (w_ss + (n - 1) w_so), of the ratio w_ss / w_so."""
    return ratio / (ratio + n - 1) if ratio != math.inf else 1.0


def softmax_ratio(n: int, a: float, row_sum: float) -> float:
    """w_ss / w_so of exp: n^(a r), r the row sum of the query, 1 + a in self-attention."""
    exponent = a * row_sum * math.log(n)
    return math.exp(exponent) if exponent < 700 else math.inf


def power_ratio(a: float, p: int) -> float:
    """w_ss / w_so of s^p: (1 + a)^p; p = 1 is linear attention."""
    return float((1 + a) ** p)


def closed_weight(kernel: Kernel, n: int, a: float, row_sum: float) -> float | None:
    """f* from the formula of the kernel; None where it is no function of the scores, or no ratio of weights."""
    if kernel.exact:
        return weight_on_special(softmax_ratio(n, a, row_sum), n)
    if kernel.weight is None or kernel.subtractive:
        return None
    score = row_sum * math.log(n)
    special, ordinary = kernel.weight(torch.tensor([(1 + a) * score, score], dtype=torch.float64)).tolist()
    return weight_on_special(special / ordinary, n) if ordinary and math.isfinite(special / ordinary) else None


def hit_rate(weight: float, a: float, b: float, c: float) -> float:
    """p1: how many of the signs s of {-1, +1}^3 have f* (s1 a + s2 b) + s3 c > c + 0.1, out of 8."""
    signs = itertools.product((-1, 1), repeat=3)
    return sum(weight * (s1 * a + s2 * b) + s3 * c > c + GAP + 1e-12 for s1, s2, s3 in signs) / 8


def alarm_rate(b: float, columns: int) -> float:
    """p0 = P(noise > 0.1) / 2, noise = b (sum of `columns` signs) / columns.

    A tie, noise = 0.1, is broken either way by terms of the order 1/n, so that half of them count.
    """
    sums = b * (2 * np.arange(columns + 1) - columns) / columns - GAP
    tied = np.abs(sums) <= 1e-12
    mass = binomial(columns)
    return float(mass[(sums > 0) & ~tied].sum() + mass[tied].sum() / 2) / 2


def success_rate(hit: float, alarm: float, m: int) -> float:
    """P(F(D1) > 0 and F(D0) = 0) = (1 - (1 - p1)^m) (1 - p0)^m, as if hits and false alarms were independent."""
    return (1 - (1 - hit) ** m) * (1 - alarm) ** m


def critical_amplitude(n: int, b: float, g: float | None = None) -> float:
    """a_crit(n), from which softmax separates: f*(n, a) (a + b) = 0.1; `g` in the variant cross."""

    def margin(a: float) -> float:
        return weight_on_special(softmax_ratio(n, a, 1 + a if g is None else g), n) * (a + b)

    found = crossing(margin, (0.0, 1.0, 10.0, 100.0, 1e3, 1e6))
    assert found is not None  # at the last, f* is one half at least
    return found


def critical_power(n: int, a: float, b: float) -> float | None:
    """The degree p from which s^p separates: (1 + a)^p = (n - 1) 0.1 / (a + b - 0.1).

    It grows like log n / log(1 + a): no fixed degree is enough for every n. None where no degree is.
    """
    if a <= 0 or a + b <= GAP:
        return None
    return math.log((n - 1) * GAP / (a + b - GAP)) / math.log1p(a)


def critical_size(p: int, a: float, b: float) -> float:
    """The n beyond which s^p no longer separates: `critical_power` the other way round."""
    return 1 + power_ratio(a, p) * max(a + b - GAP, 0) / GAP


def crossing(margin: Callable[[float], float], grid: Sequence[float]) -> float | None:
    """Where `margin` first reaches 0.1 from below on the way along `grid`, by bisection; None where it never does."""
    if margin(grid[0]) >= GAP:
        return grid[0]
    for low, high in itertools.pairwise(grid):
        if margin(low) < GAP <= margin(high):
            while (middle := (low + high) / 2) not in (low, high):
                low, high = (low, middle) if margin(middle) >= GAP else (middle, high)
            return high
    return None


# --- Exactly ---------------------------------------------------------------------------------------------------------


class Lattice:
    """Every probability of the two data sets under one network, as a sum over what a sign vector can be."""

    def __init__(self, constants: Constants, zeroth: Outputs, first: Outputs) -> None:
        others = constants.d - 3
        kinds = np.meshgrid((-1.0, 1.0), (-1.0, 1.0), 2.0 * np.arange(others + 1) - others, (-1.0, 1.0), indexing="ij")
        cases = Kinds(*(kind.ravel() for kind in kinds))
        self._m = constants.m
        self._mass = np.broadcast_to(binomial(others)[:, None] / 8, kinds[0].shape).ravel()
        self._zeroth = zeroth.of_kinds(cases).max(-1)  # over tokens
        self._first = first.of_kinds(cases).max(-1)
        on0, on1 = fires(self._zeroth, constants), fires(self._first, constants)
        self.alarm_rate, self.hit_rate, either = (self._probability(which) for which in (on0, on1, on0 | on1))
        m = constants.m
        self.d1_fires = 1 - (1 - self.hit_rate) ** m
        self.d0_silent = (1 - self.alarm_rate) ** m
        # With one y for both: no vector fires on D0, but not: none fires on either.
        self.success = self.d0_silent - (1 - either) ** m

    def _probability(self, which: NDArray[np.bool_]) -> float:
        return min(1.0, math.fsum(self._mass[which]))

    def ranking(self) -> tuple[float, float]:
        """AUC of the largest pre-activation over m vectors, drawn afresh for either set; accuracy at the best cut."""
        values, places = np.unique(np.concatenate((self._zeroth, self._first)), return_inverse=True)
        below0, below1 = (
            np.minimum(np.bincount(of, self._mass, len(values)).cumsum(), 1) ** self._m
            for of in (places[: len(self._mass)], places[len(self._mass) :])
        )
        halfway = (below0 + np.concatenate(([0.0], below0[:-1]))) / 2  # a tie counts half
        auc = float((np.diff(below1, prepend=0) * halfway).sum())
        return auc, float(0.5 + max((below0 - below1).max(), 0) / 2)


def binomial(n: int) -> Floats:
    """P(k of n fair coins are heads) for k from 0 to n."""
    logs = np.concatenate(([0.0], np.log(np.arange(1, n + 1)).cumsum()))
    found: Floats = np.exp(logs[-1] - logs - logs[::-1] - n * math.log(2))
    return found
