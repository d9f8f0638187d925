"""Where two power laws cross is known; noise widens the interval, and ranges without a crossing say so."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pomona.methods.attn_compare.speed.crossover import crossing, crossover, slope

LENGTHS = [128, 256, 512, 1024, 2048]


def test_power_laws_cross_where_algebra_says() -> None:
    quadratic, straight = [3e-6 * n**2 for n in LENGTHS], [1e-3 * n for n in LENGTHS]
    assert crossing(LENGTHS, quadratic, straight) == pytest.approx(1e-3 / 3e-6)  # n = 333.3: lines in logarithms
    found = crossover(LENGTHS, [[t] * 5 for t in quadratic], [[t] * 5 for t in straight])
    assert found.where == "within"
    assert found.at == pytest.approx(1000 / 3) and found.low == pytest.approx(found.at) == found.high


def test_a_challenger_that_falls_behind_again_has_not_overtaken_yet() -> None:
    incumbent, challenger = [1.0, 2.0, 4.0, 8.0, 16.0], [2.0, 1.0, 5.0, 4.0, 4.0]
    assert 512 < crossing(LENGTHS, incumbent, challenger) < 1024


def test_outside_the_range_there_is_no_number() -> None:
    fast, slow = [[1.0] * 3] * 5, [[2.0] * 3] * 5
    ahead, behind = crossover(LENGTHS, slow, fast), crossover(LENGTHS, fast, slow)
    assert (ahead.where, ahead.at, ahead.low, ahead.high) == ("below", None, None, None)
    assert (behind.where, behind.at, behind.low, behind.high) == ("beyond", None, None, None)
    assert crossover([128], [[1.0, 1.0]], [[1.0, 1.0]]).where == "beyond"  # a draw is no lead


def test_the_interval_covers_the_truth_about_as_often_as_it_says_and_grows_with_the_noise() -> None:
    draw = random.Random(1)
    covered, widths = 0, {0.02: 0.0, 0.2: 0.0}
    for noise in widths:
        for _ in range(60):
            incumbent = [[3e-6 * n**2 * draw.lognormvariate(0, noise) for _ in range(9)] for n in LENGTHS]
            challenger = [[1e-3 * n * draw.lognormvariate(0, noise) for _ in range(9)] for n in LENGTHS]
            found = crossover(LENGTHS, incumbent, challenger)
            assert found.low is not None and found.high is not None
            covered += found.low <= 1000 / 3 <= found.high
            widths[noise] += found.high - found.low
    assert covered >= 0.85 * 120
    assert widths[0.2] > 4 * widths[0.02]


def test_an_interval_may_reach_out_of_the_range() -> None:
    incumbent = [[1.0, 1.0, 1.0], [1.0, 4.0, 1.0]]
    challenger = [[2.0, 2.0, 2.0], [0.9, 0.9, 2.0]]
    found = crossover([100, 200], incumbent, challenger)
    assert found.where == "within" and found.low is not None and found.high is None


def test_the_slope_is_that_of_a_least_squares_line() -> None:
    times = [1e-3 * n**1.7 for n in LENGTHS]
    assert slope(LENGTHS, times) == pytest.approx(1.7)
    x, y = np.log(LENGTHS), np.log([5.0, 9.0, 21.0, 37.0, 90.0])
    by_hand = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert slope(LENGTHS, [5.0, 9.0, 21.0, 37.0, 90.0]) == pytest.approx(by_hand)
    assert slope([128], [1.0]) is None


def test_sequences_of_unlike_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 lengths, 1 and 2 times"):
        crossover([1, 2], [[1.0]], [[1.0], [1.0]])
