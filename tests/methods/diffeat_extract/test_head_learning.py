"""The recipe against plain gradient descent in NumPy; modes, order, threads, and what is not finite."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pomona.errors import CheckFailed, UsageError
from pomona.methods.diffeat_extract.heads.learning import learn, predict, rates
from pomona.methods.diffeat_extract.heads.modules import Attention, linear, mlp
from pomona.runtime.progress import Quiet

Rows = NDArray[np.int64]
FEATURES = np.random.default_rng(1).normal(size=(60, 6)).astype(np.float32)
LABELS = (FEATURES[:, 0] + FEATURES[:, 1] > 0).astype(np.int64) + (FEATURES[:, 2] > 1)
EVERY = np.arange(60)


def features(rows: Rows) -> tuple[Tensor, ...]:
    return (torch.from_numpy(FEATURES[rows]),)


def trained(
    module: nn.Module, inputs: Callable[[Rows], tuple[Tensor, ...]] = features, **changed: object
) -> list[float]:
    given = {"rows": EVERY, "epochs": 8, "batch": 16, "rate": 0.1, "seed": 3, "progress": Quiet(), **changed}
    return learn(module, inputs, LABELS, **given)


class Told(Quiet):
    steps = 0

    def advance(self, steps: int = 1) -> None:
        self.steps += steps


def test_the_step_size_falls_to_a_tenth_after_every_quarter_of_the_epochs() -> None:
    assert rates(28, 0.01) == pytest.approx([0.01] * 7 + [1e-3] * 7 + [1e-4] * 7 + [1e-5] * 7)
    assert rates(10, 1) == pytest.approx([1] * 3 + [0.1] * 2 + [0.01] * 3 + [1e-3] * 2)
    assert rates(1, 0.5) == [0.5]


def test_learning_is_gradient_descent_without_momentum_or_decay() -> None:
    head = linear(6, 3, seed=1)
    weight, bias = (p.detach().double().numpy().copy() for p in head.parameters())
    losses = trained(head, epochs=12, batch=60, rate=2.0)
    expected = []
    for epoch in range(12):
        scores = np.exp(FEATURES.astype(float) @ weight.T + bias)
        shares = scores / scores.sum(1, keepdims=True)
        expected.append(-np.log(shares[EVERY, LABELS]).mean())
        error = (shares - np.eye(3)[LABELS]) / 60
        step = 2.0 * 0.1 ** (epoch // 3)
        weight -= step * error.T @ FEATURES
        bias -= step * error.sum(0)
    assert losses == pytest.approx(expected, rel=1e-5)
    for found, known in zip(head.parameters(), (weight, bias), strict=True):
        np.testing.assert_allclose(found.detach().numpy(), known, rtol=1e-4, atol=1e-6)


def test_every_row_is_learned_from_once_an_epoch_in_a_new_order_and_batches_are_even() -> None:
    seen: list[Rows] = []

    def watched(rows: Rows) -> tuple[Tensor, ...]:
        seen.append(rows)
        return features(rows)

    told = Told()
    trained(linear(6, 3, seed=1), watched, rows=EVERY[10:59], epochs=3, progress=told)
    assert [len(rows) for rows in seen] == [13, 12, 12, 12] * 3
    epochs = [np.concatenate(seen[start : start + 4]) for start in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(10, 59)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert told.steps == 3


def test_the_same_seed_gives_the_same_bytes_and_another_one_another_order() -> None:
    heads = [mlp(6, (8,), 3, seed=1) for _ in range(3)]
    for head, seed in zip(heads, (3, 3, 4), strict=True):
        trained(head, seed=seed)
    first, second, other = (torch.nn.utils.parameters_to_vector(head.parameters()) for head in heads)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_frozen_part_stays_as_it_is() -> None:
    head = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), linear(6, 3, seed=1))
    before = head[0].weight.clone()
    trained(head)
    assert torch.equal(head[0].weight, before)
    assert head[0].weight.grad is None


def test_batch_statistics_are_learned_in_every_epoch_and_never_while_predicting() -> None:
    """In the released code the first evaluation leaves the model in evaluation mode for good."""
    head = nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.BatchNorm2d(6), linear(6, 3, seed=1))
    trained(head, epochs=2)
    assert not any(part.training for part in head.modules())
    predict(head, features, EVERY, batch=7)
    trained(head, epochs=3)
    assert int(head[1].num_batches_tracked) == 5 * 4
    head.train()
    predict(head, features, EVERY, batch=7)
    assert int(head[1].num_batches_tracked) == 5 * 4
    assert all(part.training for part in head.modules())


def test_predictions_are_of_every_row_in_order_whatever_the_batch() -> None:
    head = linear(6, 3, seed=1)
    rows = EVERY[::-1].copy()
    expected = (FEATURES @ head[1].weight.detach().numpy().T + head[1].bias.detach().numpy()).argmax(1)[::-1]
    for batch in (1, 7, 60, 100):
        assert (predict(head, features, rows, batch=batch) == expected).all()


def test_learning_and_predicting_compute_in_one_thread() -> None:
    threads = []

    def watched(rows: Rows) -> tuple[Tensor, ...]:
        threads.append(torch.get_num_threads())
        return features(rows)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        trained(head := linear(6, 3, seed=1), watched, epochs=1)
        predict(head, watched, EVERY, batch=30)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(threads) == {1}


def test_a_loss_that_is_not_finite_is_named_with_its_epoch() -> None:
    def broken(rows: Rows) -> tuple[Tensor, ...]:
        calls.append(1)
        return (features(rows)[0] * (float("nan") if len(calls) > 9 else 1),)

    calls: list[int] = []
    with pytest.raises(CheckFailed, match=r"epoch 3 of 8, with step size 0\.01"):
        trained(linear(6, 3, seed=1), broken)


def test_logits_that_are_not_finite_are_no_answer() -> None:
    head = linear(6, 3, seed=1)
    with torch.no_grad():
        head[1].bias[1] = float("inf")
    with pytest.raises(CheckFailed, match="not finite"):
        predict(head, features, EVERY, batch=7)


def test_a_step_of_one_image_is_refused_where_batches_are_normalised() -> None:
    head = nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.BatchNorm2d(6), linear(6, 3, seed=1))
    with pytest.raises(UsageError) as refused:
        trained(head, rows=EVERY[:7], batch=1)
    assert "--head-batch" in str(refused.value.hint)
    trained(head, rows=EVERY[:7], batch=6, epochs=1)
    trained(linear(6, 3, seed=1), rows=EVERY[:7], batch=1, epochs=1)


def test_an_attention_head_learns_where_two_cells_agree() -> None:
    """No linear map of the pooled features can tell; the head must compare cells."""
    random = np.random.default_rng(2)
    cells = random.integers(0, 2, (300, 2))
    maps = random.normal(size=(300, 8, 2, 2)).astype(np.float32) * 0.1
    maps[:, 0, 0, 0] += 4 * cells[:, 0] - 2
    maps[:, 1, 1, 1] += 4 * cells[:, 1] - 2
    answers = (cells[:, 0] ^ cells[:, 1]).astype(np.int64)

    def inputs(rows: Rows) -> tuple[Tensor, ...]:
        return (torch.from_numpy(maps[rows]),)

    head = Attention(8, 2, 2, seed=1)
    learn(head, inputs, answers, np.arange(200), epochs=40, batch=10, rate=0.1, seed=1, progress=Quiet())
    found = predict(head, inputs, np.arange(200, 300), batch=64)
    assert (found == answers[200:]).mean() > 0.95
