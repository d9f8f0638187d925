"""Plans against linear programming, assignment and a plain Sinkhorn; alignment against the function it must keep."""

from __future__ import annotations

import hashlib
import struct
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, linprog
from scipy.spatial.distance import cdist
from torch import Tensor

from pomona.errors import CheckFailed, DataError, UnavailableError
from pomona.methods.mera_merge.adapters import Bottleneck
from pomona.methods.mera_merge.alignment import Matching, aligned, features, match

SEEDS = st.integers(0, 2**32)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bottleneck(rank: int, width: int, seed: int = 0) -> Bottleneck:
    return Bottleneck(
        normal(rank, width, seed=seed),
        normal(rank, seed=seed + 1),
        normal(width, rank, seed=seed + 2),
        normal(width, seed=seed + 3),
    )


def permuted(site: Bottleneck, order: Tensor) -> Bottleneck:
    return Bottleneck(site.down[order], site.down_bias[order], site.up[:, order], site.up_bias)


def output(site: Bottleneck, hidden: NDArray[np.float64]) -> NDArray[np.float64]:
    """h + U relu(D h + b) + c, in float64, h (tokens, d)."""
    down, bias, up, up_bias = (part.double().numpy() for part in (site.down, site.down_bias, site.up, site.up_bias))
    return np.asarray(hidden + np.maximum(hidden @ down.T + bias, 0) @ up.T + up_bias)


def exact(reference: Tensor, other: Tensor, *, transport: bool = True) -> Matching:
    return match(reference, other, solver=None, metric="euclidean", transport=transport)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 48), st.integers(2, 20), SEEDS)
def test_an_exact_plan_between_equal_widths_is_the_permutation_that_an_assignment_finds(
    rank: int, width: int, seed: int
) -> None:
    reference, other = normal(rank, width, seed=seed), normal(rank, width, seed=seed + 1)
    cost = cdist(reference.double().numpy(), other.double().numpy())
    rows, columns = linear_sum_assignment(cost)
    for found in (exact(reference, other), exact(reference, other, transport=False)):
        assert found.permutation is not None
        assert found.permutation.tolist() == columns.tolist()
        assert torch.equal(found.plan, torch.eye(rank, dtype=torch.float64)[columns])
        assert found.cost_before == pytest.approx(np.trace(cost))
        assert found.cost_after == pytest.approx(cost[rows, columns].sum())
        assert found.moved == pytest.approx(np.mean(columns != rows))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), SEEDS)
def test_an_exact_plan_between_any_widths_is_an_optimum_of_the_linear_programme(
    ours: int, theirs: int, seed: int
) -> None:
    reference, other = normal(ours, 4, seed=seed), normal(theirs, 4, seed=seed + 1)
    cost = cdist(reference.double().numpy(), other.double().numpy())
    rows = np.kron(np.eye(ours), np.ones(theirs))
    columns = np.kron(np.ones(ours), np.eye(theirs))
    masses = np.concatenate([np.ones(ours), np.full(theirs, ours / theirs)])
    wanted = linprog(cost.ravel(), A_eq=np.concatenate([rows, columns]), b_eq=masses)
    found = exact(reference, other)
    assert found.cost_after == pytest.approx(wanted.fun, rel=1e-9)
    assert float((found.plan * torch.from_numpy(cost)).sum()) == pytest.approx(wanted.fun, rel=1e-9)
    torch.testing.assert_close(found.plan.sum(1), torch.ones(ours, dtype=torch.float64))
    torch.testing.assert_close(found.plan.sum(0), torch.full((theirs,), ours / theirs, dtype=torch.float64))
    assert bool((found.plan >= 0).all())
    assert (found.permutation is None) == (ours != theirs)
    assert (found.cost_before is None) == (ours != theirs)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 64), st.integers(1, 16), SEEDS, st.sampled_from(("down", "down+bias", "down+up")))
def test_a_permuted_copy_comes_back_bit_for_bit(rank: int, width: int, seed: int, kind: str) -> None:
    site = bottleneck(rank, width, seed)
    order = torch.randperm(rank, generator=torch.Generator().manual_seed(seed))
    copy = permuted(site, order)
    for transport in (True, False):
        found = exact(features(site, kind), features(copy, kind), transport=transport)  # type: ignore[arg-type]
        assert found.permutation is not None
        assert found.permutation.tolist() == order.argsort().tolist()
        assert found.cost_after == 0
        back = aligned(copy, found)
        for part in ("down", "down_bias", "up", "up_bias"):
            assert torch.equal(getattr(back, part), getattr(site, part))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), SEEDS)
def test_aligning_to_any_reference_changes_nothing_that_a_bottleneck_computes(rank: int, seed: int) -> None:
    reference, other = bottleneck(rank, 6, seed), bottleneck(rank, 6, seed + 9)
    moved = aligned(other, exact(features(reference, "down+bias"), features(other, "down+bias")))
    hidden = normal(50, 6, seed=seed).double().numpy()
    np.testing.assert_allclose(output(moved, hidden), output(other, hidden), rtol=0, atol=1e-12)


@pytest.mark.parametrize("parts", (2, 3))
def test_split_units_meet_the_unit_they_were_split_from_whichever_is_the_reference(parts: int) -> None:
    whole = bottleneck(4, 9)
    split = Bottleneck(
        whole.down.repeat_interleave(parts, 0),
        whole.down_bias.repeat_interleave(parts),
        whole.up.repeat_interleave(parts, 1) / parts,
        whole.up_bias,
    )
    hidden = normal(50, 9, seed=5).double().numpy()
    for reference, other in ((whole, split), (split, whole)):
        found = exact(features(reference, "down+bias"), features(other, "down+bias"))
        assert found.permutation is None
        assert found.cost_after == 0
        back = aligned(other, found)
        assert back.down.shape == reference.down.shape
        np.testing.assert_allclose(output(back, hidden), output(other, hidden), rtol=0, atol=1e-5)


def scaled(cost: NDArray[np.float64], regularisation: float, iterations: int = 20_000) -> NDArray[np.float64]:
    """Sinkhorn's iteration on the cost over its largest entry, rows scaled to 1."""
    kernel = np.exp(-cost / cost.max() / regularisation)
    left, right = np.ones(len(cost)), np.ones(cost.shape[1])
    for _ in range(iterations):
        left = 1 / len(cost) / (kernel @ right)
        right = 1 / cost.shape[1] / (kernel.T @ left)
    plan = left[:, None] * kernel * right
    return np.asarray(plan / plan.sum(1, keepdims=True))


@pytest.mark.parametrize("shape", ((6, 6), (5, 8)))
@pytest.mark.parametrize("regularisation", (1.0, 0.1, 0.03))
def test_sinkhorn_is_the_plain_iteration_on_distances_over_the_largest(
    shape: tuple[int, int], regularisation: float
) -> None:
    reference, other = normal(shape[0], 5), normal(shape[1], 5, seed=1)
    found = match(reference, other, solver=regularisation, metric="euclidean")
    cost = cdist(reference.double().numpy(), other.double().numpy())
    wanted = scaled(cost, regularisation)
    np.testing.assert_allclose(found.plan.numpy(), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.plan.sum(1), torch.ones(shape[0], dtype=torch.float64), rtol=0, atol=1e-15)
    assert found.permutation is None
    assert found.cost_after == pytest.approx((wanted * cost).sum(), rel=1e-6)
    assert found.moved == np.mean(wanted.argmax(1) != np.arange(shape[0]))


def test_sinkhorn_blends_units_less_and_less_until_it_is_the_exact_plan() -> None:
    reference = normal(12, 40)
    other = (reference + 0.5 * normal(12, 40, seed=1)).flip(0)
    wanted = exact(reference, other)
    apart = [
        float((match(reference, other, solver=reg, metric="euclidean").plan - wanted.plan).abs().max())
        for reg in (1.0, 0.1, 0.01)
    ]
    assert apart[0] > 0.5
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] < 1e-6


def test_sinkhorn_that_does_not_converge_says_so() -> None:
    with pytest.raises(CheckFailed, match="sinkhorn:1e-05 did not converge") as raised:
        match(normal(30, 5), normal(30, 5, seed=1), solver=1e-5, metric="euclidean")
    assert raised.value.hint is not None
    assert "--solver exact" in raised.value.hint


def test_units_that_are_alike_stay_where_they_are() -> None:
    twins = normal(5, 4)[[0, 1, 0, 2, 2, 3, 1, 4]]
    for transport in (True, False):
        found = exact(twins, twins, transport=transport)
        assert found.permutation is not None
        assert found.permutation.tolist() == list(range(8))
        assert (found.cost_before, found.cost_after, found.moved) == (0, 0, 0)


def test_features_are_incoming_weights_then_the_bias_then_outgoing_weights() -> None:
    site = bottleneck(3, 5)
    rows = [[*site.down[i].tolist(), site.down_bias[i].item(), *site.up[:, i].tolist()] for i in range(3)]
    for kind, count in (("down", 5), ("down+bias", 6), ("down+up", 11)):
        found = features(site, kind)  # type: ignore[arg-type]
        assert found.dtype == torch.float64
        assert found.tolist() == [row[:count] for row in rows]


def test_bias_tells_units_apart_whose_incoming_weights_are_alike() -> None:
    site = bottleneck(4, 3)
    site = Bottleneck(site.down[:1].expand(4, 3), site.down_bias, site.up, site.up_bias)
    order = torch.tensor([2, 0, 3, 1])
    copy = permuted(site, order)
    without = exact(features(site, "down"), features(copy, "down"))
    assert without.moved == 0
    with_bias = exact(features(site, "down+bias"), features(copy, "down+bias"))
    assert with_bias.permutation is not None
    assert with_bias.permutation.tolist() == order.argsort().tolist()


def test_cosine_matches_units_that_differ_in_length_alone() -> None:
    site = normal(10, 6)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    lengths = torch.linspace(0.01, 100, 10)[:, None]
    found = match(site, (site * lengths)[order], solver=None, metric="cosine")
    assert found.permutation is not None
    assert found.permutation.tolist() == order.argsort().tolist()
    assert found.cost_after < 1e-12


def test_the_digest_is_of_the_permutation_or_else_of_the_plan() -> None:
    order = [2, 0, 1]
    site = normal(3, 4)
    found = exact(site, site[torch.tensor(order).argsort()])
    assert found.digest == hashlib.sha256(struct.pack("<3q", *order)).hexdigest()
    blended = match(site, normal(3, 4, seed=1), solver=1.0, metric="euclidean")
    assert blended.digest == hashlib.sha256(struct.pack("<9d", *blended.plan.flatten().tolist())).hexdigest()


def test_alignment_keeps_number_formats() -> None:
    site = Bottleneck(*(part.bfloat16() for part in vars(bottleneck(3, 4)).values()))
    for solver in (None, 0.5):
        found = match(features(site, "down"), normal(3, 4, seed=7), solver=solver, metric="euclidean")
        assert {part.dtype for part in vars(aligned(site, found)).values()} == {torch.bfloat16}


def test_widths_and_features_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="5 and 3 units cannot be assigned"):
        exact(normal(5, 4), normal(3, 4), transport=False)
    with pytest.raises(DataError, match="described by 4 and by 6 features"):
        exact(normal(3, 4), normal(3, 6))


def test_without_pot_unequal_widths_and_sinkhorn_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    for rows, solver in ((3, 0.1), (2, None)):
        with pytest.raises(UnavailableError) as raised:
            match(normal(rows, 4), normal(3, 4), solver=solver, metric="euclidean")
        assert raised.value.hint is not None
        assert "pip install 'pomona[merge]'" in raised.value.hint
    assert exact(normal(3, 4), normal(3, 4)).moved == 0


def test_between_equal_widths_the_cheapest_plan_of_the_network_simplex_costs_no_less() -> None:
    import ot

    for rows in (2, 9, 24):
        ours, theirs = normal(rows, 6), normal(rows, 6) + 0.3 * normal(rows, 6).flip(0)
        found = exact(ours, theirs)
        cost = torch.cdist(ours.double(), theirs.double()).numpy()
        uniform = np.full(rows, 1 / rows)
        assert found.cost_after == pytest.approx(rows * ot.emd2(uniform, uniform, cost), rel=1e-9)
