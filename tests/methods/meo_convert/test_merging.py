"""Experts merged before the nonlinearity; exact for linear maps at any n and k (checks A1, A2, properties 1, 2, 5)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methods.meo_convert.tinies import linear
from pomona.methods.meo_convert import modeling_meo as meo


def by_hand(map_: meo.MergedLinear, x: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Σ_j g_j (W_j x + b_j) of every sequence in float64, its gates from the mean of its tokens."""
    weight, gate = (p.detach().double().numpy() for p in (map_.weight, map_.gate.weight))
    bias = np.zeros(weight.shape[:2]) if map_.bias is None else map_.bias.detach().double().numpy()
    out = []
    for tokens in x.double().numpy():
        logits = gate @ tokens.mean(0)
        kept = np.argsort(-logits)[: map_.settings.selected]
        scores = np.exp(logits[kept] - logits[kept].max())
        scores /= scores.sum()
        out.append(sum(g * (tokens @ weight[j].T + bias[j]) for g, j in zip(scores, kept, strict=True)))
    return np.stack(out)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k"), [(8, 2), (8, 4), (8, 8), (16, 12), (8, 1)])
def test_merged_linear_experts_equal_the_explicit_sum(n: int, k: int, bias: bool, grad: bool) -> None:
    for run_as in ("meo", "moe"):
        map_ = linear(24, 40, bias=bias, experts=n, selected=k, run_as=run_as)
        with torch.no_grad():  # the scale of trained weights, for the tolerance
            map_.weight.mul_(24**-0.5)
        x = torch.randn(5, 9, 24)
        with torch.set_grad_enabled(grad):
            found = map_(x)
        assert np.abs(found.detach().numpy() - by_hand(map_, x)).max() <= 2e-6


def test_biases_are_merged_with_the_gates_of_the_chosen_alone() -> None:
    map_ = linear(3, 2, experts=8, selected=1)
    with torch.no_grad():
        map_.weight.zero_()
    x = torch.randn(4, 2, 3)
    for found, row in zip(map_(x), map_.choose(x).choice.chosen[:, 0], strict=True):
        torch.testing.assert_close(found, map_.bias[row].expand(2, 2))  # type: ignore[index]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 10**6), st.data())
def test_permuting_experts_with_their_gate_changes_nothing(n: int, rows: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    map_ = linear(6, 5, experts=n, selected=k, seed=seed)
    x = torch.randn(rows, 4, 6)
    with torch.no_grad():
        before = map_(x)
        order = torch.randperm(n)
        for parameter in (map_.weight, map_.bias, map_.gate.weight):
            parameter.copy_(parameter[order])
        torch.testing.assert_close(map_(x), before, atol=2e-6, rtol=1e-5)


def test_a_one_hot_gate_gives_the_expert_itself() -> None:
    map_ = linear(6, 5, experts=4, selected=2)
    with torch.no_grad():
        map_.gate.weight.zero_()
        map_.gate.weight[2, 0] = 1e4
        x = torch.randn(3, 7, 6)
        x[..., 0] = 1.0
        found = map_(x)
        torch.testing.assert_close(found, x @ map_.weight[2].T + map_.bias[2], atol=1e-6, rtol=0)  # type: ignore[index]


@pytest.mark.parametrize("run_as", ["meo", "moe"])
def test_gradients_are_those_of_the_explicit_sum(run_as: str, monkeypatch: pytest.MonkeyPatch) -> None:
    map_ = linear(6, 5, experts=4, selected=2, run_as=run_as).double()
    x = torch.randn(5, 3, 6, dtype=torch.float64, requires_grad=True)
    parameters = [x, map_.weight, map_.bias, map_.gate.weight]

    def explicit() -> Tensor:
        scores = meo.top_k(x.mean(1) @ map_.gate.weight.T, 2).scores
        every = torch.einsum("nfd,bsd->nbsf", map_.weight, x) + map_.bias[:, None, None]  # type: ignore[index]
        return torch.einsum("bn,nbsf->bsf", scores, every)

    weights = torch.randn(5, 3, 5, dtype=torch.float64)
    expected = torch.autograd.grad((explicit() * weights).sum(), parameters)
    for budget in (2**28, 2 * 6 * 5 * 8 + 100):  # all at once; two sequences at a time
        monkeypatch.setattr(meo, "MERGED_AT_ONCE", budget)
        torch.testing.assert_close(torch.autograd.grad((map_(x) * weights).sum(), parameters), expected)


def test_sequences_beyond_the_memory_budget_go_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    map_ = linear(6, 5, experts=4, selected=2)
    x = torch.randn(7, 3, 6)
    made: list[int] = []
    product = meo._product

    def watched(experts: Tensor, scores: Tensor) -> Tensor:
        made.append(len(scores))
        return product(experts, scores)

    monkeypatch.setattr(meo, "_product", watched)
    with torch.no_grad():
        whole = map_(x)
        assert set(made) == {7}
        made.clear()
        monkeypatch.setattr(meo, "MERGED_AT_ONCE", 3 * (6 * 5 + 5) * 4)
        torch.testing.assert_close(map_(x), whole)
    assert max(made) == 3


def test_sequences_with_equal_gates_share_one_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    map_ = linear(6, 5, experts=4, selected=2)
    few = torch.randn(3, 4, 6)
    x = few[[0, 1, 0, 2, 1, 1]]
    rows: list[int] = []
    merge = meo.merge

    def watched(experts: Tensor, choice: meo.Choice) -> Tensor:
        rows.append(len(choice.scores))
        return merge(experts, choice)

    with torch.no_grad():
        expected = map_(few)[[0, 1, 0, 2, 1, 1]]
        monkeypatch.setattr(meo, "merge", watched)
        torch.testing.assert_close(map_(x), expected)
    assert set(rows) == {3}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("k", [2, 8])
def test_half_precision_is_rounded_once(rows: int, k: int) -> None:
    torch.manual_seed(0)
    experts = torch.randn(8, 64, 32).bfloat16()
    choice = meo.top_k(torch.randn(rows, 8), k)
    exact = np.einsum("rn,nfd->rfd", choice.scores.double().numpy(), experts.double().numpy())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = meo.merge(experts, choice)
        assert found.dtype == torch.bfloat16
        error = np.linalg.norm(found.double().numpy() - exact) / np.linalg.norm(exact)
        assert error < 1.8e-3  # of the output's rounding alone; sums in bfloat16 have about 5e-3


def test_mixed_precision_rounds_neither_gates_nor_sums() -> None:
    map_ = linear(32, 40, experts=8, selected=4)
    x = torch.randn(3, 5, 32)
    expected = map_.choose(x).choice.scores
    merged = meo.merge(map_.weight, map_.choose(x).choice)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        choice = map_.choose(x).choice
        assert torch.equal(choice.scores, expected)
        assert torch.equal(meo.merge(map_.weight, choice), merged)
        assert map_(x).dtype == torch.bfloat16


def test_one_chosen_expert_is_used_where_it_is() -> None:
    experts = torch.randn(4, 5, 6)
    with torch.no_grad():
        merged = meo.merge(experts, meo.top_k(torch.tensor([[0.0, 0.0, 9.0, 0.0]]), 1))
    assert merged.data_ptr() == experts[2].data_ptr()


def test_vanilla_mixtures_at_the_token_level_gate_every_token() -> None:
    map_ = linear(6, 5, experts=4, selected=2, level="token", run_as="moe")
    with torch.no_grad():
        x = torch.randn(2, 3, 6)
        tokens = map_.token(x).reshape(-1, 1, 6)
        alone = linear(6, 5, experts=4, selected=2, run_as="moe")
        alone.load_state_dict({name: p for name, p in map_.state_dict().items() if not name.startswith("token")})
        torch.testing.assert_close(map_(x), alone(tokens).view(2, 3, 5))
        merged = linear(6, 5, experts=4, selected=2, level="token")
        merged.load_state_dict(map_.state_dict())
        assert (merged(x) - map_(x)).abs().max() > 0.1  # the same name for two things
