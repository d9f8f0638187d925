"""Intervals, tests, agreement and power against scipy, exact counting and the printed figures of the paper."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from pomona.methods.nlpbench_eval.statistics import (
    Calibration,
    Cell,
    agreement,
    cluster_bootstrap,
    cohen_kappa,
    corrected_accuracy,
    detectable_difference,
    detectable_paired_difference,
    holm,
    majority_at_k,
    mcnemar,
    paired_bootstrap,
    pass_at_k,
    wilson,
)

# Multiple choice, short answer, math: right answers out of 159, 192, 25; and the overall per cent the paper prints.
PRINTED = [
    (33, 74, 1, 28.72),
    (53, 74, 0, 33.77),
    (32, 35, 0, 17.82),
    (45, 18, 0, 16.76),
    (55, 19, 0, 19.68),
    (44, 20, 0, 17.02),
    (53, 22, 0, 19.95),
    (38, 94, 2, 35.64),
    (40, 100, 2, 37.77),
    (36, 50, 0, 22.87),
    (61, 59, 0, 31.91),
    (54, 86, 0, 37.23),
    (50, 82, 0, 35.11),
    (59, 76, 1, 36.17),
    (64, 86, 4, 40.96),
    (62, 85, 5, 40.42),
    (68, 71, 3, 37.77),
    (66, 88, 0, 40.96),
    (62, 95, 0, 41.75),
    (76, 90, 2, 44.68),
    (64, 96, 2, 43.08),
    (65, 97, 1, 43.35),
    (7, 0, 0, 1.86),
    (15, 1, 0, 4.25),
    (66, 132, 4, 53.72),
    (61, 126, 5, 51.06),
    (71, 120, 4, 51.86),
    (45, 0, 0, 11.97),
]


@pytest.mark.parametrize(("choice", "short", "math", "printed"), PRINTED)
def test_the_published_counts_give_the_published_percentages(
    choice: int, short: int, math: int, printed: float
) -> None:
    value = Cell(choice + short + math, 159 + 192 + 25).value
    assert value is not None
    assert abs(100 * value - printed) < 0.01  # the paper truncates some


def test_llama_13b_without_context_improves_once_the_unanswered_are_left_out() -> None:
    zero, few = Cell(53, 206).value, Cell(63, 206).value
    assert zero is not None and few is not None
    assert (round(100 * zero, 2), round(100 * few, 2)) == (25.73, 30.58)


def test_a_cell_knows_its_interval_and_whether_it_is_small() -> None:
    cell = Cell(13, 15)
    assert (cell.low, cell.high) == wilson(13, 15)
    assert cell.small and Cell(19, 19).small and not Cell(20, 20).small


def test_no_items_have_no_accuracy_and_any_accuracy_is_possible() -> None:
    empty = Cell(0, 0)
    assert empty.value is None and (empty.low, empty.high) == (0, 1) and empty.small


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="right answers"):
        Cell(k, n)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (101, 159, 0.5580, 0.7060),
        (13, 15, 0.6212, 0.9626),
        (0, 3, 0.0000, 0.5615),
        (9, 25, 0.2025, 0.5548),
        (108, 376, 0.2438, 0.3349),
        (3, 3, 0.4385, 1.0),
    ],
)
def test_wilson_intervals_of_the_specification(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95]))
def test_wilson_agrees_with_scipy(counts: tuple[int, int], confidence: float) -> None:
    theirs = stats.binomtest(*counts).proportion_ci(confidence, method="wilson")
    low, high = wilson(*counts, confidence)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1


@pytest.mark.parametrize(
    ("b", "c", "exact", "mid"),
    [(5, 15, 0.041389, 0.026604), (20, 40, 0.013489, 0.009853), (10, 10, 1, 1), (0, 0, 1, 1)],
)
def test_mcnemar_of_the_specification(b: int, c: int, exact: float, mid: float) -> None:
    assert mcnemar(b, c) == pytest.approx((exact, mid), abs=5e-7)


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_agrees_with_the_binomial_test(b: int, c: int) -> None:
    exact, mid = mcnemar(b, c)
    if b + c:
        assert exact == pytest.approx(stats.binomtest(b, b + c).pvalue, rel=1e-9)
        fewer = min(b, c)
        binomial = stats.binom(b + c, 0.5)
        assert mid == pytest.approx(min(1, 2 * binomial.cdf(fewer - 1) + binomial.pmf(fewer)), rel=1e-9)
    assert mcnemar(c, b) == (exact, mid)


def test_mcnemar_of_large_counts_neither_overflows_nor_rounds_to_zero() -> None:
    assert 0 < mcnemar(100, 900)[1] < mcnemar(100, 900)[0] < 1e-150
    assert mcnemar(5000, 5100)[0] == pytest.approx(stats.binomtest(5000, 10100).pvalue, rel=1e-9)


def test_holm_of_the_specification_in_any_order() -> None:
    ps, adjusted = [0.001, 0.013, 0.02, 0.04, 0.2], [0.005, 0.052, 0.06, 0.08, 0.2]
    assert holm(ps) == pytest.approx(adjusted)
    assert holm(ps[::-1]) == pytest.approx(adjusted[::-1])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1, 1]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_stepping_down_rejects(ps: list[float]) -> None:
    adjusted = holm(ps)
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
            if (len(ps) - rank) * ps[index] > level:
                break
            rejected.add(index)
        assert {index for index, p in enumerate(adjusted) if p <= level} == rejected


def _pairs(both: int, b: int, c: int, neither: int) -> tuple[list[int], list[int]]:
    return [1] * (both + b) + [0] * (c + neither), [1] * both + [0] * b + [1] * c + [0] * neither


def test_the_paired_bootstrap_of_the_specification() -> None:
    first, second = _pairs(50, 20, 40, 49)
    result = paired_bootstrap(first, second, range(159))
    assert result[0] == pytest.approx(-0.1258, abs=5e-5)
    assert result[1:] == pytest.approx((-0.220, -0.031), abs=0.01)
    assert paired_bootstrap(first, second, range(159)) == result
    few = [paired_bootstrap(first, second, range(159), draws=11, seed=seed) for seed in range(5)]
    assert len(set(few)) > 1


def _loop_bootstrap(values: list[float], clusters: list[int], draws: int) -> tuple[float, float]:
    """Clusters drawn one by one with replacement: the definition, without what makes it fast."""
    random = np.random.default_rng(99)
    names = sorted(set(clusters))
    members = {name: [v for v, c in zip(values, clusters, strict=True) if c == name] for name in names}
    means = []
    for _ in range(draws):
        drawn = [value for name in random.choice(names, len(names)) for value in members[name]]
        means.append(sum(drawn) / len(drawn))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def test_resampling_clusters_agrees_with_drawing_them_one_by_one() -> None:
    random = np.random.default_rng(3)
    clusters = sorted(random.integers(0, 30, 120).tolist())
    values = [float(random.random() < 0.2 + 0.02 * cluster) for cluster in clusters]
    ours = cluster_bootstrap(values, clusters, draws=20_000)
    assert ours == pytest.approx(_loop_bootstrap(values, clusters, 4_000), abs=0.012)
    alone = cluster_bootstrap(values, range(120), draws=20_000)
    assert ours[1] - ours[0] > 1.15 * (alone[1] - alone[0])  # the items of a cluster are alike here


def test_resampling_continuous_scores_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(4).normal(0.3, 0.1, 400)
    half = 1.96 * values.std() / 20
    assert cluster_bootstrap(values, range(400)) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.001
    )


def test_one_cluster_cannot_vary() -> None:
    assert cluster_bootstrap([1, 0, 1, 1], ["a"] * 4) == (0.75, 0.75)


def test_unlike_lengths_and_no_items_are_refused() -> None:
    with pytest.raises(ValueError):
        paired_bootstrap([1, 0], [1], [0, 1])
    with pytest.raises(ValueError):
        cluster_bootstrap([1, 0], [0])
    with pytest.raises(ValueError):
        cluster_bootstrap([], [])


def test_the_paired_bootstrap_is_vectorised() -> None:
    random = np.random.default_rng(5)
    first, second = random.integers(0, 2, (2, 378)).tolist()
    clusters = [index // 3 if index < 169 else index for index in range(378)]
    start = time.process_time()
    for _ in range(10):
        paired_bootstrap(first, second, clusters)
    assert time.process_time() - start < 5  # a loop over draws takes a minute


def test_kappa_of_the_specification() -> None:
    assert cohen_kappa("1110001010", "1100011010") == pytest.approx(0.6)
    assert agreement("1110001010", "1100011010") == 0.8


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=40))
def test_kappa_agrees_with_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    x, y = [a for a, _ in pairs], [b for _, b in pairs]
    ours = cohen_kappa(x, y)
    if len({*x, *y}) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(cohen_kappa_score(x, y), abs=1e-12)


def test_agreement_without_items_is_undefined() -> None:
    assert agreement([], []) is None and cohen_kappa([], []) is None
    with pytest.raises(ValueError):
        agreement([1], [])


def test_calibration_counts_the_judge_against_people() -> None:
    judge = [True, True, False, False, True, False]
    human = [True, True, True, False, False, False]
    calibration = Calibration.of(judge, human)
    assert calibration == Calibration(sensitivity=Cell(2, 3), specificity=Cell(2, 3))


def test_a_known_judge_is_corrected_to_the_true_share() -> None:
    calibration = Calibration(Cell(9000, 10_000), Cell(8000, 10_000))
    corrected = corrected_accuracy(Cell(48_000, 100_000), calibration)  # 0.9 p + 0.2 (1 - p) = 0.48
    assert corrected is not None
    assert corrected[0] == pytest.approx(0.4)
    assert corrected[1] < 0.4 < corrected[2] and corrected[2] - corrected[1] < 0.04


def test_a_perfect_judge_leaves_the_count_and_its_wilson_interval_nearly_alone() -> None:
    corrected = corrected_accuracy(Cell(108, 376), Calibration(Cell(10**6, 10**6), Cell(10**6, 10**6)))
    assert corrected == pytest.approx((108 / 376, *wilson(108, 376)), abs=2e-3)


@pytest.mark.parametrize(
    "calibration",
    [Calibration(Cell(0, 0), Cell(5, 5)), Calibration(Cell(5, 5), Cell(0, 0)), Calibration(Cell(1, 2), Cell(1, 2))],
)
def test_a_judge_without_information_corrects_nothing(calibration: Calibration) -> None:
    assert corrected_accuracy(Cell(10, 20), calibration) is None
    assert corrected_accuracy(Cell(0, 0), Calibration(Cell(5, 5), Cell(5, 5))) is None


def test_the_corrected_interval_is_lang_and_reiczigels() -> None:
    """Their formula written out in their notation: counts n·p + z²/2, n·Se + 1, n·Sp + 1, and the shift d."""
    z = stats.norm.ppf(0.975)
    n, k, n_se, k_se, n_sp, k_sp = 192, 120, 40, 36, 30, 24
    p, se, sp = (k + z**2 / 2) / (n + z**2), (k_se + 1) / (n_se + 2), (k_sp + 1) / (n_sp + 2)
    prevalence = (p + sp - 1) / (se + sp - 1)
    v_p, v_se, v_sp = p * (1 - p) / (n + z**2), se * (1 - se) / (n_se + 2), sp * (1 - sp) / (n_sp + 2)
    d = 2 * z**2 * (prevalence * v_se - (1 - prevalence) * v_sp)
    error = np.sqrt(v_p + prevalence**2 * v_se + (1 - prevalence) ** 2 * v_sp) / (se + sp - 1)
    point = (k / n + k_sp / n_sp - 1) / (k_se / n_se + k_sp / n_sp - 1)
    expected = (point, prevalence + d - z * error, prevalence + d + z * error)
    assert corrected_accuracy(Cell(k, n), Calibration(Cell(k_se, n_se), Cell(k_sp, n_sp))) == pytest.approx(expected)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_the_corrected_interval_holds_its_level(rate: float) -> None:
    """Simulated: judge and calibration drawn anew each time; a naive interval would cover the truth almost never."""
    random = np.random.default_rng(6)
    se, sp, covered, trials = 0.9, 0.8, 0, 2000
    for _ in range(trials):
        calibration = Calibration(Cell(int(random.binomial(40, se)), 40), Cell(int(random.binomial(40, sp)), 40))
        observed = Cell(int(random.binomial(192, rate * se + (1 - rate) * (1 - sp))), 192)
        corrected = corrected_accuracy(observed, calibration)
        assert corrected is not None and 0 <= corrected[1] <= corrected[0] <= corrected[2] <= 1
        covered += corrected[1] <= rate <= corrected[2]
    assert 0.93 < covered / trials < 0.995


@pytest.mark.parametrize(("n", "unpaired", "paired"), [(378, 10.2, 6.4), (159, 15.7, 9.9), (25, 39.6, None)])
def test_detectable_differences_of_the_specification(n: int, unpaired: float, paired: float | None) -> None:
    assert round(100 * detectable_difference(n), 1) == unpaired
    if paired is not None:
        assert round(100 * detectable_paired_difference(n), 1) == paired


def test_the_detectable_difference_is_found_with_its_power() -> None:
    random = np.random.default_rng(7)
    n, difference = 378, detectable_difference(378)
    first = random.binomial(n, 0.5 - difference / 2, 20_000) / n
    second = random.binomial(n, 0.5 + difference / 2, 20_000) / n
    error = np.sqrt((first * (1 - first) + second * (1 - second)) / n)
    assert np.mean((second - first) / error > 1.96) == pytest.approx(0.8, abs=0.02)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    subsets = list(itertools.combinations(right, k))
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@settings(deadline=None)
@given(st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=1, max_size=6), st.data())
def test_majority_at_k_is_the_share_of_orders_whose_vote_is_right(votes: list[str | None], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(votes)))
    orders = list(itertools.permutations(votes, k))
    won = Fraction(0)
    for order in orders:
        ranked = Counter(vote for vote in order if vote is not None).most_common(1)
        won += bool(ranked) and ranked[0][0] == "a"
    assert majority_at_k(votes, "a", k) == pytest.approx(float(won / len(orders)))


def test_more_samples_than_there_are_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="4 of 3"):
        pass_at_k(3, 1, 4)
    with pytest.raises(ValueError, match="0 of 1"):
        majority_at_k(["a"], "a", 0)
    assert math.isclose(pass_at_k(3, 0, 3), 0)
