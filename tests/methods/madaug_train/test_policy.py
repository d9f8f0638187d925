"""The policy: what it computes is its layers by NumPy, and its first weights are its seed's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pomona.methods.madaug_train.policy import Policy

FEATURES, OPERATIONS = 6, 5


@pytest.mark.parametrize("hidden", [0, 2])
def test_magnitudes_come_first_and_logits_last(hidden: int) -> None:
    policy = Policy(FEATURES, OPERATIONS, hidden, seed=3)
    features = torch.randn(7, FEATURES, generator=torch.Generator().manual_seed(0))
    layers = [each.detach().numpy().astype(np.float64) for each in policy.parameters()]
    assert [each.shape for each in layers[::2]] == (
        [(2 * OPERATIONS, FEATURES)] if not hidden else [(128, FEATURES), (128, 128), (2 * OPERATIONS, 128)]
    )
    x = features.numpy().astype(np.float64)
    for number, (weight, bias) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
        x = (np.maximum(x, 0) if number else x) @ weight.T + bias
    logits, magnitudes = policy(features)
    np.testing.assert_allclose(logits.detach(), x[:, OPERATIONS:], rtol=0, atol=1e-6)
    np.testing.assert_allclose(magnitudes.detach(), 1 / (1 + np.exp(-x[:, :OPERATIONS])), rtol=0, atol=1e-6)


def test_the_first_weights_are_the_seed_s_and_within_torch_s_bounds() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (Policy(FEATURES, OPERATIONS, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    for left, right, third in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right) and not torch.equal(left, third)
        assert left.abs().max() <= FEATURES**-0.5  # torch's default: uniform in +-1/sqrt(fan in)
