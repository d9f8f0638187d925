"""Acceptance check A3: as many images are augmented as the curve says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pomona.methods.madaug_train.config import Config
from pomona.methods.madaug_train.curriculum import probability
from pomona.methods.madaug_train.recipe import recipe
from pomona.methods.madaug_train.sampling import coins

BATCH, BATCHES = 50, 1000


@pytest.mark.parametrize("epoch", [0, 10, 20, 40])
@pytest.mark.parametrize("tau", [20.0, 40.0])
def test_the_share_augmented_is_tanh_within_three_sigma(epoch: int, tau: float) -> None:
    random = np.random.Generator(np.random.Philox(epoch))
    expected = math.tanh(epoch / tau)
    thrown = np.concatenate([coins(random, probability(epoch, tau, 0.0), BATCH) for _ in range(BATCHES)])
    assert thrown.dtype == bool and thrown.shape == (BATCH * BATCHES,)
    sigma = math.sqrt(expected * (1 - expected) / len(thrown))
    assert abs(thrown.mean() - expected) <= 3 * sigma


def test_nothing_is_augmented_at_first_in_the_paper_and_one_in_a_hundred_in_the_code() -> None:
    random = np.random.Generator(np.random.Philox(0))
    paper, code = (recipe(Config(), preset) for preset in ("paper", "code"))
    assert probability(0, paper.tau, paper.curriculum_floor) == 0.0
    assert not coins(random, 0.0, 100_000).any()
    assert probability(0, code.tau, code.curriculum_floor) == 0.01
    assert probability(40, code.tau, code.curriculum_floor) == math.tanh(1) + 0.01


def test_the_curve_ends_at_one_and_without_tau_begins_there() -> None:
    values = [probability(epoch, 40.0, 0.01) for epoch in range(0, 241)]
    assert values == sorted(values) and values[-1] == 1.0
    # Section 1.2: everything from epoch 106 on, as the released code has it.
    assert values[106] > 1 - 1e-12 > values[105]
    assert probability(0, 0.0, 0.0) == 1.0
    assert coins(np.random.Generator(np.random.Philox(0)), 1.0, 100_000).all()
