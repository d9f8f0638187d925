"""What is calculated, against scipy, enumeration of every sign vector, and simulation."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import optimize, stats
from sklearn.metrics import roc_auc_score

from methods.attn_compare.separation_loops import WEIGHTS, attended, data
from pomona.methods.attn_compare.kernels import find
from pomona.methods.attn_compare.separation import theory
from pomona.methods.attn_compare.separation.constants import Constants
from pomona.methods.attn_compare.separation.construction import Outputs, outputs
from pomona.methods.attn_compare.separation.trials import simulate

GOLDEN = (math.sqrt(5) - 1) / 2


def lattice(name: str, constants: Constants) -> theory.Lattice:
    zeroth, first = (outputs(find(name), constants, a, None) for a in (constants.a0, constants.a1))
    assert isinstance(zeroth, Outputs) and isinstance(first, Outputs)
    return theory.Lattice(constants, zeroth, first)


def test_at_the_golden_ratio_softmax_attends_to_itself_as_to_all_others() -> None:
    assert theory.weight_on_special(theory.softmax_ratio(1000, GOLDEN, 1 + GOLDEN), 1000) == pytest.approx(
        1000 / 1999, abs=1e-12
    )


@pytest.mark.parametrize(("n", "printed"), [(100, 0.458), (1000, 0.507), (10_000, 0.534)])
def test_critical_amplitudes_are_those_known(n: int, printed: float) -> None:
    found = theory.critical_amplitude(n, 0.1)
    assert found == pytest.approx(printed, abs=0.001)
    root = optimize.brentq(lambda a: (a + 0.1) / (1 + (n - 1) * n ** (-a * (1 + a))) - 0.1, 0, 2, xtol=1e-14)
    assert found == pytest.approx(root, abs=1e-12)


def test_the_critical_amplitude_tends_to_the_golden_ratio_and_in_the_cross_variant_to_one_over_g() -> None:
    assert 0 < GOLDEN - theory.critical_amplitude(10**12, 0.1) < 0.04
    root = optimize.brentq(lambda a: (a + 0.1) / (1 + 999 * 1000 ** (-2 * a)) - 0.1, 0, 2, xtol=1e-14)
    assert theory.critical_amplitude(1000, 0.1, g=2.0) == pytest.approx(root, abs=1e-12)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("row_sum", [None, 2.0])
def test_the_weight_on_the_special_token_is_what_attention_gives(name: str, row_sum: float | None) -> None:
    n, a = 60, 0.8
    keys = data(n, 12, a, 0.3, 0.7)
    queries = keys if row_sum is None else np.full((n, 1), row_sum * math.sqrt(math.log(n))) * np.eye(12)[11]
    truth = attended(WEIGHTS[name], queries, keys)[0, 0] / keys[0, 0]
    assert theory.closed_weight(find(name), n, a, 1 + a if row_sum is None else row_sum) == pytest.approx(
        truth, rel=1e-12
    )


def test_kernels_without_a_formula_have_no_closed_weight() -> None:
    assert theory.closed_weight(find("favor:16"), 100, 1.0, 2.0) is None
    assert theory.closed_weight(find("inline"), 100, 1.0, 2.0) is None


def test_the_degree_a_power_needs_grows_with_the_logarithm_of_n() -> None:
    for n in (100, 1000, 10**6):
        p = theory.critical_power(n, 1.0, 0.1)
        assert p is not None
        margin = 2**p / (2**p + n - 1) * 1.1
        assert margin == pytest.approx(0.1, rel=1e-12)
    assert [math.ceil(theory.critical_power(n, 1.0, 0.1) or 0) for n in (1000, 2001)] == [7, 8]
    assert theory.critical_size(8, 1.0, 0.1) == pytest.approx(2561)
    assert theory.critical_power(1000, 0.05, 0.05) is None and theory.critical_power(1000, 0.0, 0.5) is None


def test_hits_and_false_alarms_to_leading_order() -> None:
    assert theory.hit_rate(1.0, 1.0, 0.1, 0.9) == 1 / 4
    assert theory.hit_rate(1.0, 1.0, 0.5, 0.5) == 3 / 8  # s1 = s3 = 1, or s1 = s2 = 1 and s3 = -1
    assert theory.hit_rate(0.002, 1.0, 0.1, 0.9) == 0
    coin = stats.binom(100, 0.5)
    assert theory.alarm_rate(0.5, 100) == pytest.approx((coin.sf(60) + coin.pmf(60) / 2) / 2, rel=1e-12)
    assert theory.alarm_rate(0.5, 100) == pytest.approx(0.01151, abs=5e-6)
    assert theory.alarm_rate(0.1, 100) == pytest.approx(0.5**102, rel=1e-9)
    success = theory.success_rate(3 / 8, theory.alarm_rate(0.5, 100), 20)
    assert success == pytest.approx(0.793, abs=5e-4)


def test_binomial_probabilities_are_scipys() -> None:
    for n in (0, 1, 7, 99, 5000):
        np.testing.assert_allclose(
            theory.binomial(n), stats.binom(n, 0.5).pmf(np.arange(n + 1)), rtol=1e-9, atol=1e-300
        )


@pytest.mark.parametrize(
    ("name", "c", "a0"), [("exp", 0.2, 0.05), ("exp", 0.3, 0.5), ("linear", 0.1, 0.05), ("pow:2", 0.0, 0.3)]
)
def test_every_sign_vector_tried_gives_the_exact_rates(name: str, c: float, a0: float) -> None:
    n, d, m = 16, 10, 3
    constants = Constants(n, d, m, a0, 1.0, c)
    every = np.array(list(itertools.product((-1, 1), repeat=d)))
    tau = (c + 0.1) * math.sqrt(math.log(n))
    largest = []
    for a in (a0, 1.0):
        keys = data(n, d, a, 1 - c, c)
        largest.append((every @ attended(WEIGHTS[name], keys, keys).T).max(1))
    on0, on1 = (values > tau + 1e-12 for values in largest)
    exact = lattice(name, constants)
    assert 0 < on0.mean() < 1
    assert exact.alarm_rate == pytest.approx(on0.mean(), abs=1e-12)
    assert exact.hit_rate == pytest.approx(on1.mean(), abs=1e-12)
    assert exact.d1_fires == pytest.approx(1 - (~on1).mean() ** m, abs=1e-12)
    assert exact.d0_silent == pytest.approx((~on0).mean() ** m, abs=1e-12)
    # m vectors, none of which fires on D0, and not all of which are silent on D1
    assert exact.success == pytest.approx((~on0).mean() ** m - (~on0 & ~on1).mean() ** m, abs=1e-12)


def test_the_exact_ranking_is_that_of_all_pairs_of_samples() -> None:
    n, d, c = 12, 6, 0.3
    every = np.array(list(itertools.product((-1, 1), repeat=d)))
    pairs = list(itertools.product(range(len(every)), repeat=2))  # m = 2
    largest = []
    for a in (0.05, 1.0):
        keys = data(n, d, a, 1 - c, c)
        each = (every @ attended(WEIGHTS["linear"], keys, keys).T).max(1).round(12)
        largest.append(np.array([max(each[i], each[j]) for i, j in pairs]))
    labels = np.repeat([0, 1], len(pairs))
    auc, best = lattice("linear", Constants(n, d, 2, 0.05, 1.0, c)).ranking()
    assert auc == pytest.approx(roc_auc_score(labels, np.concatenate(largest)), abs=1e-12)
    cuts = np.unique(np.concatenate(largest))
    assert best == pytest.approx(max(((largest[1] > t).mean() + (largest[0] <= t).mean()) / 2 for t in cuts), abs=1e-12)


@pytest.mark.parametrize(
    ("name", "changed"), [("exp", {"c": 0.5}), ("exp", {"a0": 0.5}), ("pow:6", {"m": 64, "c": 0.8})]
)
def test_simulation_agrees_with_what_is_calculated(name: str, changed: dict[str, float]) -> None:
    constants = Constants(**{"n": 1000, "d": 102, "m": 20, "a0": 0.05, "a1": 1.0, "c": 0.9, **changed})  # type: ignore[arg-type]
    zeroth, first = (outputs(find(name), constants, a, None) for a in (constants.a0, constants.a1))
    values, _ = simulate(constants, zeroth, first, 4000, 0).measured()
    exact = lattice(name, constants)
    for measured, truth, count in (
        ("success", exact.success, 4000),
        ("hit_rate", exact.hit_rate, 4000 * constants.m),
        ("alarm_rate", exact.alarm_rate, 4000 * constants.m),
        ("auc", exact.ranking()[0], 4000),
    ):
        value = values[measured]
        assert value is not None
        assert abs(value - truth) <= 4 * math.sqrt(truth * (1 - truth) / count) + 1e-9, measured


def test_of_two_samples_alike_neither_ranks_higher() -> None:
    constants = Constants(100, 12, 5, 0.05, 1.0, 0.5)
    same = outputs(find("exp"), constants, 1.0, None)
    assert isinstance(same, Outputs)
    assert theory.Lattice(constants, same, same).ranking() == pytest.approx((0.5, 0.5), abs=1e-12)


def test_ties_with_tau_that_fractions_prove_do_not_fire() -> None:
    """At a1 = 9 linear attention meets tau exactly: 91/1009 + 9.9/1009 = 0.1, where rounding errors would decide."""
    weight, b = Fraction(10, 1009), Fraction(1, 10)
    hit = tied = 0.0
    for first, own in itertools.product((-1, 1), repeat=2):
        for heads in range(100):
            others = 2 * heads - 99
            value = weight * (9 * first + b * own) + (1 - weight) / 999 * b * (10 * (others + own) - own)
            share = math.comb(99, heads) / 2**99 / 8  # the last sign is +1
            hit += share * (value > b)
            tied += share * (value == b)
    assert tied > 0.005
    constants = Constants(1000, 102, 20, 0.05, 9.0, 0.9)
    assert lattice("linear", constants).hit_rate == pytest.approx(hit, rel=1e-9)
    zeroth, first_set = (outputs(find("linear"), constants, a, None) for a in (0.05, 9.0))
    values, _ = simulate(constants, zeroth, first_set, 10_000, 0).measured()
    assert values["hit_rate"] == pytest.approx(hit, abs=4 * math.sqrt(hit / 200_000))


def test_crossings_are_found_from_below_only() -> None:
    assert theory.crossing(lambda a: a / 10, (0.0, 5.0)) == pytest.approx(1.0, abs=1e-12)
    assert theory.crossing(lambda a: 0.05, (0.0, 5.0)) is None
    assert theory.crossing(lambda a: math.nan, (0.0, 5.0)) is None
    assert theory.crossing(lambda a: 0.2, (0.5, 5.0)) == 0.5
