"""Distances against SciPy's, and the assignment against every permutation there is."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch import Tensor

from pomona.errors import CheckFailed
from pomona.models.matching import Metric, assignment, distances


def units(count: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
@pytest.mark.parametrize("shape", ((1, 1, 1), (7, 5, 3), (48, 48, 769), (60, 31, 2000)))
def test_distances_are_scipys(metric: Metric, shape: tuple[int, int, int]) -> None:
    r, s, f = shape
    reference, other = units(r, f), units(s, f, seed=1)
    wanted = cdist(reference.double().numpy(), other.double().numpy(), metric)
    found = distances(reference, other, metric)
    assert found.dtype == torch.float64
    assert found.shape == (r, s)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
def test_equal_units_are_at_exactly_zero_and_close_ones_keep_their_digits(metric: Metric) -> None:
    far = 1000 + units(40, 300).double()  # one product of matrices alone would leave 1e-5 here
    assert distances(far, far, metric).diagonal().abs().max() == 0
    near = far + 1e-6 * units(40, 300, seed=1).double()
    wanted = (far - near).norm(dim=1)
    if metric == "cosine":
        left, right = (x / x.norm(dim=1, keepdim=True) for x in (far, near))
        wanted = (left - right).square().sum(1) / 2
    torch.testing.assert_close(distances(far, near, metric).diagonal(), wanted, rtol=1e-9, atol=0)


def test_a_unit_of_zeros_is_far_from_the_rest_by_cosine_and_at_its_equal_at_zero() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert distances(rows, rows, "cosine").tolist() == [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_what_is_not_finite_is_refused(bad: float) -> None:
    rows = units(3, 3)
    rows[1, 1] = bad
    with pytest.raises(CheckFailed, match="not finite"):
        distances(rows, units(3, 3))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**32), st.booleans())
def test_no_permutation_costs_less_than_the_assignment(width: int, seed: int, ties: bool) -> None:
    cost = torch.rand(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if ties:
        cost = (3 * cost).round()
    found = assignment(cost)
    assert found.dtype == torch.int64
    assert sorted(found.tolist()) == list(range(width))
    least = min(sum(float(cost[i, q]) for i, q in enumerate(p)) for p in permutations(range(width)))
    assert float(cost[torch.arange(width), found].sum()) == pytest.approx(least, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 80), st.integers(1, 12), st.integers(0, 2**32))
def test_a_permutation_of_distinct_units_is_recovered(width: int, features: int, seed: int) -> None:
    reference = units(width, features, seed)
    permutation = torch.randperm(width, generator=torch.Generator().manual_seed(seed + 1))
    other = reference[permutation.argsort()]
    found = assignment(distances(reference, other))
    assert found.tolist() == permutation.tolist()
    assert torch.equal(other[found], reference)


def test_where_nothing_is_gained_nothing_moves() -> None:
    assert assignment(torch.zeros(5, 5)).tolist() == [0, 1, 2, 3, 4]
    twins = units(4, 3)[[0, 1, 0, 1, 2, 2, 3]]
    assert assignment(distances(twins, twins)).tolist() == list(range(7))
