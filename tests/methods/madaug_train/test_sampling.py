"""Acceptance check A4: what is drawn is what successive draws without replacement give, and jitter keeps its bounds."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from pomona.methods.madaug_train.sampling import STREAMS, chain, coins, signs_and_centres, uniform_chain

N = 20_000
LOGITS = torch.tensor([0.9, -0.4, 0.1, 1.7, -1.2])
MAGNITUDES = torch.tensor([0.05, 0.5, 0.95, 0.3, 0.7])


def randoms(seed: int = 0) -> dict[str, np.random.Generator]:
    return {name: np.random.Generator(np.random.Philox(seed + place)) for place, name in enumerate(STREAMS)}


def drawn(temperature: float = 1.0, jitter: float = 0.3, seed: int = 0, k: int = 2):
    logits, magnitudes = LOGITS.expand(N, -1), MAGNITUDES.expand(N, -1)
    return chain(logits, magnitudes, k=k, temperature=temperature, jitter=jitter, randoms=randoms(seed))


def successive(temperature: float, k: int) -> dict[tuple[int, ...], float]:
    """The probability of each ordered choice: each draw from the softmax of what is left."""
    weights = np.exp(LOGITS.numpy().astype(np.float64) / temperature)
    found = {}
    for order in permutations(range(len(weights)), k):
        left, probability = weights.sum(), 1.0
        for place in order:
            probability *= weights[place] / left
            left -= weights[place]
        found[order] = probability
    return found


@pytest.mark.parametrize(("temperature", "k"), [(1.0, 2), (3.0, 2), (1.0, 3), (1.0, 1)])
def test_operations_are_successive_draws_without_replacement_in_order(temperature: float, k: int) -> None:
    operations = drawn(temperature, k=k).operations.numpy()
    expected = successive(temperature, k)
    assert operations.shape == (N, k)
    assert (np.sort(operations, axis=1)[:, 1:] > np.sort(operations, axis=1)[:, :-1]).all()
    places, counts = np.unique(operations, axis=0, return_counts=True)
    seen = dict(zip(map(tuple, places.tolist()), counts, strict=True))
    observed = [seen.get(order, 0) for order in expected]
    assert chisquare(observed, N * np.array(list(expected.values()))).pvalue > 1e-3


def test_magnitudes_are_moved_evenly_both_ways_and_clipped() -> None:
    found = drawn(jitter=0.3)
    assert found.magnitudes.dtype == torch.float32
    assert found.magnitudes.min() >= 0 and found.magnitudes.max() <= 1
    for operation, given in enumerate(MAGNITUDES.numpy()):
        moved = found.magnitudes[found.operations == operation].numpy()
        assert np.abs(moved - given).max() <= 0.3 + 1e-6
        inside = moved[(moved > 0) & (moved < 1)]
        low, high = max(given - 0.3, 0), min(given + 0.3, 1)
        assert kstest(inside, "uniform", (low, high - low)).pvalue > 1e-3
        # What is clipped is as much as the interval has outside.
        outside = 1 - (high - low) / 0.6
        assert abs(np.isin(moved, (0, 1)).mean() - outside) <= 4 * np.sqrt(0.25 / len(moved))
    still = drawn(jitter=0.0)
    assert torch.equal(still.magnitudes, MAGNITUDES[still.operations])


def test_signs_are_turned_for_half_and_holes_are_anywhere() -> None:
    found = drawn()
    for slot in range(2):
        assert abs(found.mirrored[:, slot].float().mean() - 0.5) <= 3 * np.sqrt(0.25 / N)
        for axis in range(2):
            assert kstest(found.centres[:, slot, axis].numpy(), "uniform").pvalue > 1e-3
    assert found.centres.dtype == torch.float32 and found.centres.max() < 1
    assert abs(np.corrcoef(found.mirrored[:, 0], found.mirrored[:, 1])[0, 1]) < 0.03
    assert abs(np.corrcoef(found.centres[:, 0, 0], found.centres[:, 0, 1])[0, 1]) < 0.03


def test_the_random_contender_draws_operations_and_magnitudes_evenly() -> None:
    found = uniform_chain(N, 5, 2, randoms())
    pairs, counts = np.unique(found.operations.numpy(), axis=0, return_counts=True)
    assert len(pairs) == 20 and (pairs[:, 0] != pairs[:, 1]).all()
    assert chisquare(counts).pvalue > 1e-3
    assert kstest(found.magnitudes.flatten().numpy(), "uniform").pvalue > 1e-3
    assert (found.operations.dtype, found.magnitudes.dtype) == (torch.int64, torch.float32)
    assert (found.mirrored.dtype, found.centres.shape) == (torch.bool, (N, 2, 2))


@pytest.mark.parametrize("stream", STREAMS)
def test_each_stream_decides_its_own_thing_alone(stream: str) -> None:
    logits, magnitudes = LOGITS.expand(8, -1), MAGNITUDES.expand(8, -1)
    one, other = randoms(), randoms()
    other[stream] = np.random.Generator(np.random.Philox(99))
    settings = {"k": 2, "temperature": 1.0, "jitter": 0.1}
    left, right = (chain(logits, magnitudes, **settings, randoms=each) for each in (one, other))  # type: ignore[arg-type]
    for name in STREAMS:
        same = torch.equal(getattr(left, name), getattr(right, name))
        # Magnitudes follow the operations that they are of.
        assert same == (name != stream and not (stream == "operations" and name == "magnitudes"))


def test_policies_are_drawn_from_without_a_gradient_and_the_same_again() -> None:
    logits = LOGITS.expand(4, -1).clone().requires_grad_()
    magnitudes = MAGNITUDES.expand(4, -1).clone().requires_grad_()
    found = [chain(logits, magnitudes, k=2, temperature=1.0, jitter=0.3, randoms=randoms()) for _ in range(2)]
    assert not found[0].magnitudes.requires_grad
    assert all(torch.equal(getattr(found[0], name), getattr(found[1], name)) for name in STREAMS)
    assert (coins(randoms()["operations"], 0.5, 9) == coins(randoms()["operations"], 0.5, 9)).all()
    mirrored, centres = signs_and_centres((3, 2), randoms(), torch.device("cpu"))
    assert (mirrored.shape, centres.shape) == ((3, 2), (3, 2, 2))
