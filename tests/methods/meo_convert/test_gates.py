"""Noisy top-k gates, their load and the load-balancing loss, against the formulas in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from methods.meo_convert.tinies import linear, stir, tiny
from pomona.methods.meo_convert import modeling_meo as meo


def gate(n: int, k: int, width: int, seed: int) -> meo.NoisyTopK:
    torch.manual_seed(seed)
    made = meo.NoisyTopK(width, meo.Settings(experts=n, selected=k)).double()
    with torch.no_grad():
        made.weight.copy_(torch.randn(n, width))
        made.noise.copy_(torch.randn(n, width))
    return made


def chosen_by_hand(logits: Any, k: int) -> Any:
    """Softmax over the k largest of every row, zero elsewhere."""
    out = np.zeros_like(logits)
    for row, scores in zip(logits, out, strict=True):
        kept = sorted(range(len(row)), key=lambda j: (-row[j], j))[:k]
        weights = np.exp([row[j] - row[kept[0]] for j in kept])
        scores[kept] = weights / weights.sum()
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10**6), st.data())
def test_gates_are_a_softmax_over_the_k_largest_logits(n: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    made = gate(n, k, 5, seed).eval()
    x = torch.randn(7, 5, dtype=torch.float64)
    found = made(x)
    expected = chosen_by_hand(x.numpy() @ made.weight.detach().numpy().T, k)
    np.testing.assert_allclose(found.scores.detach().numpy(), expected, atol=1e-12)
    assert found.chosen.shape == (7, k)


def test_among_equal_logits_the_first_experts_are_chosen() -> None:
    fresh = meo.NoisyTopK(4, meo.Settings(experts=8, selected=3)).eval()
    found = fresh(torch.randn(2, 4))
    assert found.chosen.tolist() == [[0, 1, 2]] * 2
    assert found.scores[0].tolist() == pytest.approx([1 / 3] * 3 + [0] * 5)


def test_a_score_that_underflows_to_zero_is_chosen_still() -> None:
    found = meo.top_k(torch.tensor([[200.0, 0.0, -300.0]]), 2)
    assert found.scores.tolist() == [[1.0, 0.0, 0.0]]
    assert found.chosen.tolist() == [[0, 1]]


def test_noise_is_drawn_in_training_alone_with_the_width_of_the_formula() -> None:
    made = gate(4, 4, 3, seed=2).train()
    x = torch.randn(1, 3, dtype=torch.float64).expand(40000, 3)
    clean = (x[0] @ made.weight.T).detach().numpy()
    spread = np.log1p(np.exp((x[0] @ made.noise.T).detach().numpy())) + 0.01
    logs = np.log(made(x).scores.detach().numpy())
    differences = logs[:, 1:] - logs[:, :1]  # logits up to a common term
    np.testing.assert_allclose(differences.mean(0), clean[1:] - clean[0], atol=0.05)
    np.testing.assert_allclose(differences.var(0), spread[1:] ** 2 + spread[0] ** 2, rtol=0.05)
    made.eval()
    assert torch.equal(made(x).scores[0], made(x).scores[1])


def test_load_is_the_chance_to_be_chosen_if_ones_own_noise_were_drawn_again() -> None:
    made = gate(5, 2, 3, seed=3).train()
    x = torch.randn(6, 3, dtype=torch.float64)
    torch.manual_seed(11)
    scores = made(x).scores.detach().numpy()
    torch.manual_seed(11)
    clean = (x @ made.weight.T).detach().numpy()
    spread = np.log1p(np.exp((x @ made.noise.T).detach().numpy())) + 0.01
    noisy = clean + spread * torch.randn(6, 5, dtype=torch.float64).numpy()
    load = np.zeros(5)
    for row in range(6):
        for j in range(5):
            others = sorted(np.delete(noisy[row], j))[::-1]
            z = (clean[row, j] - others[1]) / spread[row, j]  # the second largest of the others is to be beaten
            load[j] += 0.5 * math.erfc(-z / math.sqrt(2))
    assert made.balance is not None
    np.testing.assert_allclose(made.balance.detach().numpy(), np.stack((scores.sum(0), load)), atol=1e-12)


def test_with_all_experts_selected_load_is_a_count() -> None:
    made = gate(3, 3, 2, seed=4).train()
    made(torch.randn(5, 2, dtype=torch.float64))
    assert made.balance is not None and made.balance[1].tolist() == [5.0] * 3


def test_balancing_loss_is_the_squared_variation_of_importance_and_load_over_all_gates() -> None:
    pair = nn.ModuleList([linear(4, 3, experts=4, selected=2, seed=seed).train() for seed in (1, 2)])
    x = torch.randn(6, 5, 4)
    for map_ in pair:
        map_(x)
    expected = 0.0
    for map_ in pair:
        for sums in map_.gate.balance.detach().double().numpy():  # type: ignore[union-attr, operator]
            expected += sums.var(ddof=1) / (sums.mean() ** 2 + 1e-10)
    loss = meo.load_balancing_loss(pair)
    assert float(loss.detach()) == pytest.approx(0.01 * expected, rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(float(map_.gate.weight.grad.norm()) > 0 for map_ in pair)  # type: ignore[union-attr, operator, arg-type]
    assert float(meo.load_balancing_loss(pair, weight=1.0).detach()) == pytest.approx(100 * float(loss.detach()))


def test_balancing_loss_is_the_same_for_merged_and_mixed_experts() -> None:
    losses = []
    for run_as in ("meo", "moe"):
        map_ = linear(4, 3, experts=8, selected=2, run_as=run_as).train()
        torch.manual_seed(5)
        map_(torch.randn(6, 5, 4))
        losses.append(float(meo.load_balancing_loss(map_).detach()))
    assert losses[0] == losses[1] > 0


def test_there_is_no_balancing_loss_at_the_task_level_nor_outside_training() -> None:
    map_ = linear(4, 3, experts=4, selected=2, level="task", task_tokens=(3, 5)).train()
    map_(torch.randn(2, 3, 4))
    assert float(meo.load_balancing_loss(map_)) == 0.0
    map_ = linear(4, 3, experts=4, selected=2).train()
    map_(torch.randn(2, 3, 4))
    assert float(meo.load_balancing_loss(map_).detach()) > 0
    map_.eval()
    map_(torch.randn(2, 3, 4))
    assert float(meo.load_balancing_loss(map_)) == 0.0


def test_a_models_own_loss_has_no_balancing_in_it() -> None:
    model = meo.install(tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), {"experts": 4})
    ids = torch.randint(3, 50, (2, 6))
    evaluated = float(model(input_ids=ids, labels=ids).loss.detach())
    model.train()  # copies: noise alters the gates, not the output
    assert float(model(input_ids=ids, labels=ids).loss.detach()) == pytest.approx(evaluated, rel=1e-6)
    assert float(meo.load_balancing_loss(model).detach()) > 0


def test_padding_and_empty_segments_are_not_counted() -> None:
    map_ = linear(4, 3, experts=4, selected=2, scope="segment:2", causal=True).train()
    x = torch.randn(2, 6, 4)
    map_.scene.now = meo.Pass(mask=torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]))
    map_(x)
    assert float(map_.gate.balance[0].detach().sum()) == pytest.approx(2 + 3)
    map_ = linear(4, 3, experts=4, selected=2, level="token", run_as="moe").train()
    map_.scene.now = meo.Pass(mask=torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]))
    map_(x)
    assert float(map_.gate.balance[0].detach().sum()) == pytest.approx(3 + 6)


def test_one_expert_is_never_out_of_balance() -> None:
    map_ = linear(4, 3, experts=1, selected=1).train()
    map_(torch.randn(2, 3, 4))
    assert float(meo.load_balancing_loss(map_).detach()) == 0.0


def test_task_gate_sees_the_mean_of_its_description_whatever_the_input() -> None:
    map_ = linear(4, 3, experts=4, selected=2, level="task", task_tokens=(7, 2, 7))
    embedding, reduce = map_.task.embedding.weight, map_.task.reduce
    assert embedding.shape == (2, 128) and reduce.weight.shape == (2, 128)  # two distinct tokens; 128 // 64
    features = ((2 * embedding[1] + embedding[0]) / 3) @ reduce.weight.T + reduce.bias
    scores = chosen_by_hand((features @ map_.gate.weight.T).detach().numpy()[None], 2)
    assert map_.choose(torch.randn(2, 3, 4)).choice.scores.detach().numpy() == pytest.approx(scores, abs=1e-6)


def test_token_block_is_a_residual_bottleneck_that_starts_as_the_identity() -> None:
    block = meo.TokenBlock(128, meo.Settings(token_reduction=64))
    assert {name: tuple(p.shape) for name, p in block.named_parameters()} == {
        "down.weight": (2, 128), "down.bias": (2,), "up.weight": (128, 2), "up.bias": (128,),
    }  # fmt: skip
    x = torch.randn(3, 4, 128)
    assert torch.equal(block(x), x)
    assert not block.down.bias.any() and float(block.down.weight.detach().abs().max()) <= 128**-0.5
    stir(block)
    up, down = block.up.weight.double(), block.down.weight.double()
    expected = x.double() + (x.double() @ down.T).clamp(min=0) @ up.T
    torch.testing.assert_close(block(x).double(), expected, atol=1e-6, rtol=0)
