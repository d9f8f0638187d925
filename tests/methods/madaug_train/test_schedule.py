"""The order of images and the step size, beside torch's own schedulers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from methods.madaug_train.trainings import settled
from pomona.methods.madaug_train.schedule import Schedule


def test_every_image_comes_once_in_an_epoch_each_time_in_another_order() -> None:
    schedule = Schedule(settled(train_batch=4, epochs=3), 11, seed=5)
    assert (schedule.batches, schedule.steps) == (3, 9)
    seen = [[schedule.batch(3 * epoch + number).tolist() for number in range(3)] for epoch in range(3)]
    assert all([len(batch) for batch in epoch] == [4, 4, 3] for epoch in seen)
    orders = [[place for batch in epoch for place in batch] for epoch in seen]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert schedule.batch(4).tolist() == seen[1][1], "after a later epoch was asked for"
    assert Schedule(settled(train_batch=4), 11, seed=6).batch(0).tolist() != seen[0][0]


@pytest.mark.parametrize(("images", "sizes"), [(9, [4, 4]), (8, [4, 4]), (10, [4, 4, 2]), (3, [3])])
def test_a_last_batch_of_one_image_is_left_out(images: int, sizes: list[int]) -> None:
    schedule = Schedule(settled(train_batch=4), images, seed=0)
    assert [len(schedule.batch(step)) for step in range(schedule.batches)] == sizes


@pytest.mark.parametrize(("every", "start"), [(1, 0), (2, 0), (2, 1), (4, 1), (5, 2), (1000, 1), (1000, 0), (1, 3)])
def test_the_steps_of_the_policy_are_told_before_they_are_taken(every: int, start: int) -> None:
    schedule = Schedule(settled(train_batch=4, epochs=3, policy_every=every, policy_start=start), 11, seed=0)
    taken = [step for step in range(9) if step % every == 0 and step >= 3 * start]
    assert schedule.updates == len(taken) and [step for step in range(9) if schedule.moves_policy(step)] == taken


@pytest.mark.parametrize(("warmup", "factor", "least"), [(0, 1.0, 0.0), (2, 1.0, 0.01), (3, 2.0, 1e-4), (0, 2.0, 0.0)])
def test_the_step_size_is_a_linear_warm_up_and_a_cosine(warmup: int, factor: float, least: float) -> None:
    recipe = settled(epochs=10, warmup_epochs=warmup, warmup_factor=factor, min_lr=least, lr=0.1, train_batch=5)
    schedule = Schedule(recipe, 20, seed=0)
    steps, rising, peak = 40, 4 * warmup, 0.1 * factor
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=peak)
    begin = 0.1 if factor != 1 else 0.0  # as in the released code
    parts: list[LRScheduler] = [CosineAnnealingLR(optimiser, steps - rising, least)]
    if rising:
        # their first factor is of the step before ours
        first = (begin + (peak - begin) / rising) / peak
        parts.insert(0, LinearLR(optimiser, first, 1.0, rising - 1))
    theirs = SequentialLR(optimiser, parts, [rising] if rising else []) if rising else parts[0]
    expected = []
    for _ in range(steps):
        expected.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        theirs.step()
    np.testing.assert_allclose([schedule.rate(step) for step in range(steps)], expected, rtol=1e-9)
    assert max(expected) == pytest.approx(peak)
