"""Each measure against NumPy and scipy, row by row, and where approximate weights vanish."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import rel_entr, softmax

from pomona.methods.attn_compare.fidelity import measures


def matrices(seed: int, heads: int = 2, n: int = 12, spread: float = 2.0) -> torch.Tensor:
    """Causal attention matrices with rows of sum one."""
    scores = np.random.default_rng(seed).normal(0, spread, (heads, n, n))
    scores[:, ~np.tril(np.ones((n, n), bool))] = -np.inf
    return torch.from_numpy(softmax(scores, -1))


def test_divergence_is_scipys_where_every_key_has_weight() -> None:
    p, q = matrices(0), matrices(1)
    found, touched = measures.divergence(p, q)
    np.testing.assert_allclose(found, rel_entr(p.numpy(), q.numpy()).sum(-1), atol=1e-12)
    assert not touched.any()


def test_a_kernel_equal_to_softmax_does_not_diverge_however_small_its_weights() -> None:
    p = matrices(0, spread=60.0)  # weights down to 1e-100
    found, touched = measures.divergence(p, p.clone())
    assert float(found.max()) <= 1e-12 and not touched.any()


def test_a_denied_key_counts_as_one_of_weight_1e_12_and_its_row_is_told() -> None:
    p = torch.tensor([[[0.5, 0.3, 0.2]]], dtype=torch.float64)
    for refusal in (0.0, 1e-40, -0.7):
        q = torch.tensor([[[0.6, refusal, 0.4]]], dtype=torch.float64)
        found, touched = measures.divergence(p, q)
        total = 0.6 + 1e-12 + 0.4
        expected = sum(a * math.log(a / (b / total)) for a, b in ((0.5, 0.6), (0.3, 1e-12), (0.2, 0.4)))
        assert float(found) == pytest.approx(expected, rel=1e-12) and touched.all()


def test_a_row_without_weight_diverges_as_uniform_does() -> None:
    p = torch.tensor([[[0.7, 0.2, 0.1, 0.0]]], dtype=torch.float64)
    found, touched = measures.divergence(p, torch.zeros_like(p))
    expected = math.log(3) - float(stats.entropy([0.7, 0.2, 0.1]))
    assert float(found) == pytest.approx(expected, abs=1e-9) and touched.all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3), st.integers(0, 9))
def test_divergence_is_never_negative_nor_infinite(weights: list[float], seed: int) -> None:
    p = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(3)))[None, None]
    found, _ = measures.divergence(p, torch.tensor(weights, dtype=torch.float64)[None, None])
    assert 0 <= float(found) < math.inf


def test_output_error_is_a_ratio_of_frobenius_norms() -> None:
    p, q, v = matrices(0), matrices(1), torch.from_numpy(np.random.default_rng(2).normal(size=(2, 12, 5)))
    found = measures.output_error(p, q, v)
    for head in range(2):
        lost, kept = ((p - q) @ v)[head].numpy(), (p @ v)[head].numpy()
        expected = math.sqrt((lost**2).sum() / (kept**2).sum())
        assert float(found[head]) == pytest.approx(expected, rel=1e-12)


def test_entropy_is_scipys() -> None:
    p = matrices(0)
    np.testing.assert_allclose(measures.entropy(p), stats.entropy(p.numpy(), axis=-1), atol=1e-12)
    assert float(measures.entropy(torch.tensor([1.0, 0.0]))) == 0


def test_a_tie_for_the_largest_weight_is_a_miss() -> None:
    p = torch.tensor([[[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.4, 0.4, 0.2]]])
    q = torch.tensor([[[0.5, 0.2, 0.3], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.5, 0.3, 0.2]]])
    assert measures.agreement(p, q).tolist() == [[True, False, False, False]]
    uniform = torch.full((1, 4, 3), 1 / 3)
    assert not measures.agreement(p, uniform).any()  # an argmax alone would hit token 0


def test_without_the_first_key_rows_are_made_whole_again() -> None:
    p = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.9, 0.075, 0.025]]], dtype=torch.float64)
    expected = [[[0, 0], [1, 0], [0.75, 0.25]]]
    np.testing.assert_allclose(measures.without_first(p), expected, atol=1e-15)


def tied(seed: int, n: int = 17) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two matrices with many ties, and a mask of which each row sees a prefix."""
    random = np.random.default_rng(seed)
    first, second = (torch.from_numpy(random.integers(0, 6, (2, n, n)).astype(float)) for _ in range(2))
    return first, second, torch.ones(n, n, dtype=torch.bool).tril()


def test_ranks_are_scipys_with_ties_sharing_their_mean() -> None:
    first, _, visible = tied(0)
    found = measures.ranks(first, visible)
    for head, row in itertools.product(range(2), range(17)):
        expected = stats.rankdata(first[head, row, : row + 1]) - 1
        np.testing.assert_array_equal(found[head, row, : row + 1], expected)


def test_spearman_is_scipys_and_undefined_of_rows_all_alike() -> None:
    first, second, visible = tied(1)
    second[0, 5] = 3.0
    found = measures.spearman(measures.ranks(first, visible), measures.ranks(second, visible), visible)
    for head, row in itertools.product(range(2), range(17)):
        one, two = first[head, row, : row + 1], second[head, row, : row + 1]
        if len(set(one.tolist())) == 1 or len(set(two.tolist())) == 1:
            assert math.isnan(float(found[head, row]))
        else:
            assert float(found[head, row]) == pytest.approx(stats.spearmanr(one, two).statistic, abs=1e-12)
    assert math.isnan(float(found[0, 5]))


def test_discordant_pairs_are_those_in_opposite_orders_and_ties_are_none() -> None:
    first, second, visible = tied(2)
    found = measures.discordance(measures.ranks(first, visible), measures.ranks(second, visible), visible)
    for head, row in itertools.product(range(2), range(1, 17)):
        one, two = first[head, row].tolist(), second[head, row].tolist()
        pairs = list(itertools.combinations(range(row + 1), 2))
        opposed = sum((one[i] - one[j]) * (two[i] - two[j]) < 0 for i, j in pairs)
        assert float(found[head, row]) == pytest.approx(opposed / len(pairs), abs=1e-6)


def test_nearest_rows_leave_out_pairs_of_equal_queries() -> None:
    queries = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]], dtype=torch.float64)
    rows = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0.9, 0.1], [0.6, 0.4]]], dtype=torch.float64)
    assert float(measures.nearest_rows(rows, queries)) == pytest.approx(0.1 * math.sqrt(2), rel=1e-12)
    assert float(measures.nearest_rows(rows[:, [0, 2, 0]], queries[:, [0, 2, 3]])) == 0


def test_a_denominator_near_zero_is_small_beside_its_terms() -> None:
    raw = torch.tensor([[[1.0, -0.9999], [1.0, -0.9], [1e-9, 1e-9], [0.0, 0.0]]], dtype=torch.float64)
    assert measures.near_zero(raw).tolist() == [[True, False, False, True]]


def test_effective_samples_run_from_one_to_all() -> None:
    random = np.random.default_rng(3)
    queries, keys = (torch.from_numpy(random.exponential(size=(1, n, 8))) for n in (3, 4))
    found = measures.effective_samples(queries, keys)
    for i, j in itertools.product(range(3), range(4)):
        products = (queries[0, i] * keys[0, j]).numpy()
        assert float(found[0, i, j]) == pytest.approx(products.sum() ** 2 / (products**2).sum(), rel=1e-12)
    alike = torch.ones(1, 2, 8)
    assert measures.effective_samples(alike, alike).eq(8).all()
    lone = torch.eye(8)[None, :1]
    assert measures.effective_samples(lone, alike).eq(1).all()


def test_state_and_break_even_of_the_specification() -> None:
    assert measures.break_even(64, 64, 64) == 32.5  # elu1
    assert round(measures.break_even(2145, 64, 64)) == 1089  # taylor2
    assert measures.break_even(814_385, 64, 64) == pytest.approx(4.1e5, rel=0.01)  # degree 4
    assert measures.state_bytes(64, 64) == 64 * 65 * 4
