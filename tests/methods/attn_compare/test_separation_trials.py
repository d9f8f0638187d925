"""Sign vectors and what is counted of them, against plain arrays, scipy and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from pomona.methods.attn_compare.kernels import find
from pomona.methods.attn_compare.separation import signs as packed
from pomona.methods.attn_compare.separation.constants import Constants
from pomona.methods.attn_compare.separation.construction import outputs
from pomona.methods.attn_compare.separation.signs import Signs, drawn
from pomona.methods.attn_compare.separation.trials import Trials, auc, best_cut, simulate
from pomona.report.intervals import wilson

BASE = Constants(n=100, d=12, m=7, a0=0.05, a1=1.0, c=0.5)


@pytest.mark.parametrize("d", [3, 4, 63, 64, 65, 128, 200])
def test_the_four_kinds_are_sums_of_the_signs_themselves(d: int) -> None:
    (signs,) = drawn("kinds", 50, 3, d)
    each = signs.each()
    assert each.shape == (50, 3, d) and set(np.unique(each)) == {-1.0, 1.0}
    first, own, others, last = signs.kinds
    np.testing.assert_array_equal(first, each[..., 0])
    np.testing.assert_array_equal(own, each[..., 1])
    np.testing.assert_array_equal(others, each[..., 2:-1].sum(-1))
    np.testing.assert_array_equal(last, each[..., -1])


def test_bits_are_signs_in_order() -> None:
    signs = Signs(np.array([[0b101, 1 << 63]], dtype=np.uint64), 128)
    assert np.flatnonzero(signs.each()[0] > 0).tolist() == [0, 2, 127]


def test_signs_are_fair_and_independent() -> None:
    (signs,) = drawn("fair", 4000, 1, 100)
    each = signs.each()[:, 0]
    assert np.abs(each.mean(0)).max() < 5 / math.sqrt(4000)
    assert np.abs(np.cov(each.T) - np.eye(100)).max() < 6 / math.sqrt(4000)


def test_a_trial_is_the_same_among_few_and_many_and_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    (many,) = drawn("content", 40, 5, 100)
    (few,) = drawn("content", 3, 5, 100)
    np.testing.assert_array_equal(few.words, many.words[:3])
    monkeypatch.setattr(packed, "_WORDS_AT_ONCE", 30)
    batches = list(drawn("content", 40, 5, 100))
    assert len(batches) == 14
    np.testing.assert_array_equal(np.concatenate([batch.words for batch in batches]), many.words)


def test_other_content_gives_other_signs() -> None:
    first, second = (next(drawn(content, 10, 5, 100)).words for content in ("a", "b"))
    assert (first != second).all()


def test_counts_are_those_of_the_same_signs_one_by_one() -> None:
    kernel = find("exp")
    zeroth, first = (outputs(kernel, BASE, a, None) for a in (0.4, 1.0))
    trials = simulate(BASE, zeroth, first, 200, 3)
    content = f"separation/3/{BASE}"
    shared, fresh = (next(drawn(f"{content}/{name}", 200, 7, 12)).each() for name in ("shared", "fresh"))

    def tokens(network: object, each: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        rows = network.rows  # type: ignore[attr-defined]
        columns = np.concatenate((rows[:, :2], np.repeat(rows[:, 2:3], 9, 1), rows[:, 3:]), 1)
        return each @ columns.T  # type: ignore[no-any-return]

    on1, on0 = tokens(first, shared).max(-1), tokens(zeroth, shared).max(-1)
    tau = 0.6 * math.sqrt(math.log(100))
    np.testing.assert_array_equal(trials.hits, (on1 > tau + 1e-11).sum(1))
    np.testing.assert_array_equal(trials.alarms, (on0 > tau + 1e-11).sum(1))
    np.testing.assert_allclose(trials.first, on1.max(1), atol=1e-12)
    np.testing.assert_allclose(trials.zeroth, tokens(zeroth, fresh).max((1, 2)), atol=1e-12)
    assert 0 < trials.alarms.sum() < 200 * 7


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    zeroth, first = (outputs(find("exp"), BASE, a, None) for a in (0.05, 1.0))
    whole = simulate(BASE, zeroth, first, 100, 0)
    monkeypatch.setattr(packed, "_WORDS_AT_ONCE", 50)
    parts = simulate(BASE, zeroth, first, 100, 0)
    for name in ("hits", "alarms", "first", "zeroth"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_a_success_fires_on_d1_and_is_silent_on_d0_in_the_same_trial() -> None:
    hits, alarms = np.array([0, 2, 1, 0]), np.array([0, 0, 3, 1])
    values, intervals = Trials(hits, alarms, 4, np.arange(4.0), np.arange(4.0)).measured()
    assert (values["success"], values["d1_fires"], values["d0_silent"]) == (0.25, 0.5, 0.5)
    assert (values["hit_rate"], values["alarm_rate"]) == (3 / 16, 4 / 16)
    exact = stats.binomtest(3, 16).proportion_ci(method="wilson")
    assert intervals["hit_rate"] == pytest.approx([exact.low, exact.high], abs=1e-12)


def test_auc_is_scikit_learns_ties_included() -> None:
    random = np.random.default_rng(0)
    positive, negative = random.integers(0, 6, 200) + 1.0, random.integers(0, 6, 300) + 0.0
    labels = np.repeat([1, 0], [200, 300])
    expected = roc_auc_score(labels, np.concatenate((positive, negative)))
    assert auc(positive, negative) == pytest.approx(expected, abs=1e-12)
    assert auc(np.ones(5), np.ones(9)) == 0.5


def test_the_cut_is_chosen_on_one_half_and_judged_on_the_other() -> None:
    positive, negative = np.array([2.0, 3.0, 0.0, 5.0]), np.array([0.0, 1.0, 4.0, 0.5])
    assert best_cut(positive, negative) == (2, 4)  # a cut at 1: of 0, 5 and 4, 0.5 two are right
    assert best_cut(positive[:1], negative[:1]) is None
    assert best_cut(np.array([2.0, 1.0]), np.array([1.0, 1.0])) == (1, 2)  # at the cut is not above it
    random = np.random.default_rng(1)
    alike = random.normal(size=(2, 10_000))
    right, of = best_cut(*alike) or (0, 1)
    assert abs(right / of - 0.5) < 0.02  # no gain from having looked


def test_a_cut_is_as_good_as_any_on_the_half_it_was_chosen_on() -> None:
    random = np.random.default_rng(2)
    positive, negative = random.normal(1, 1, 50), random.normal(0, 1, 50)
    twice = best_cut(np.tile(positive, 2), np.tile(negative, 2))
    best = max(int((positive > t).sum() + (negative <= t).sum()) for t in np.concatenate((positive, negative)))
    assert twice == (best, 100)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 17), (998, 1000)])
def test_intervals_are_scipys(k: int, n: int) -> None:
    exact = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_the_interval_of_an_auc_covers_it_at_least_as_often_as_promised() -> None:
    random = np.random.default_rng(3)
    truth = stats.norm.cdf(1 / math.sqrt(2))
    covered = 0
    for _ in range(500):
        low, high = wilson(auc(random.normal(1, 1, 40), random.normal(0, 1, 40)) * 40, 40)
        covered += low <= truth <= high
    assert covered >= 0.95 * 500
