"""Fitted maps: the loss they are fitted by, what fitting brings, and that no head's fit depends on another's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pomona.methods.attn_compare.fidelity import learning, measures
from pomona.methods.attn_compare.fidelity.capture import Heads, gaussian
from pomona.methods.attn_compare.kernels import attention, find
from pomona.methods.attn_compare.maps import FeatureMap


def heads(seed: int = 0, count: int = 3, n: int = 48, width: int = 8) -> Heads:
    random = np.random.default_rng(seed)
    q, k, v = (torch.from_numpy(random.normal(0, 1.5, (count, n, width))) for _ in range(3))
    return Heads(q, k, v, width**-0.5)


def divergence(name: str, made: tuple[FeatureMap, FeatureMap], at: Heads, *, full: bool = False) -> torch.Tensor:
    visible = at.sees(full=full)
    p = attention(find("exp"), at.q, at.k, at.scale, visible=visible)
    with torch.no_grad():
        q = attention(find(name), at.q, at.k, at.scale, visible=visible, maps=made)
    return measures.divergence(p, q)[0][:, 1:].mean(-1)


def test_the_loss_is_the_cross_entropy_of_softmaxs_rows() -> None:
    at = heads()
    visible = at.sees()
    p = attention(find("exp"), at.q, at.k, at.scale, visible=visible)
    made = learning.fit(find("hedgehog"), at, 0, seed=0)

    def phi(x: np.ndarray) -> np.ndarray:
        raised = np.exp(x), np.exp(-x)
        return np.concatenate([half / half.sum(-1, keepdims=True) for half in raised], -1)

    raw = phi(at.q.numpy()) @ phi(at.k.numpy()).transpose(0, 2, 1) * visible.numpy()
    expected = -(p.numpy() * np.log(raw / raw.sum(-1, keepdims=True), where=visible.numpy(), out=0 * raw)).sum(-1)
    found = learning.cross_entropy(made, at.q, at.k, p, visible)
    assert float(found.detach()) == pytest.approx(expected.mean(-1).sum(), rel=1e-9)


def test_no_steps_leave_maps_where_they_begin() -> None:
    queries, keys = learning.fit(find("hedgehog"), heads(), 0, seed=0)
    for phi in (queries, keys):
        (matrix,) = phi.parameters()
        assert matrix.equal(torch.eye(8).repeat(3, 1, 1))


@pytest.mark.parametrize("name", ["hedgehog", "t2r"])
@pytest.mark.parametrize("full", [False, True])
def test_learning_brings_every_head_nearer_to_softmax(name: str, full: bool) -> None:
    at = heads()
    before = divergence(name, learning.fit(find(name), at, 0, seed=1), at, full=full)
    after = divergence(name, learning.fit(find(name), at, 60, seed=1, full=full), at, full=full)
    assert bool((after < 0.75 * before).all())


def test_no_heads_fit_depends_on_another() -> None:
    at = heads()
    together = learning.fit(find("hedgehog"), at, 12, seed=0)
    alone = learning.fit(find("hedgehog"), at.part(1, 2), 12, seed=0)
    for both, one in zip(together, alone, strict=True):
        for matrix, own in zip(both.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(matrix[1:2], own, rtol=1e-4, atol=1e-5)


def test_queries_and_keys_learn_maps_of_their_own() -> None:
    queries, keys = learning.fit(find("hedgehog"), heads(), 5, seed=0)
    (one,), (two,) = queries.parameters(), keys.parameters()
    assert not one.equal(two)


def test_learning_is_the_same_every_time_and_draws_nothing_from_the_global_stream() -> None:
    at = gaussian(1.0, 32, 0, "fitted")
    torch.manual_seed(3)
    first = learning.fit(find("t2r"), at, 5, seed=9)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.rand(1).equal(drawn)
    second = learning.fit(find("t2r"), at, 5, seed=9)
    for one, two in zip(first, second, strict=True):
        assert all(a.equal(b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
