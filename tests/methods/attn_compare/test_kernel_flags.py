"""What the registry says of each kernel holds, or fails, on random queries and keys; checks 16 and 17."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from pomona.methods.attn_compare import maps
from pomona.methods.attn_compare.fidelity import measures
from pomona.methods.attn_compare.kernels import Kernel, attention, find, registered, weights

WIDTH, SCALE = 8, 8**-0.5
NAMES = [kernel.name for kernel in registered()]


def drawn(seed: int, count: int, size: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, size, (count, WIDTH)))


def rows(kernel: Kernel, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Attention of each query alone at the last position, so that only its content can matter."""
    built = None
    if kernel.weight is None:
        built = kernel.build(WIDTH, SCALE, length=len(k), seed=5)
        for phi in built:
            phi.requires_grad_(False)
    found = []
    for query in q:
        here = query.expand(len(k), -1)
        found.append(attention(kernel, here, k, SCALE, maps=built).squeeze(0)[-1])
    return torch.stack(found)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_never_negative_where_the_registry_says_so(name: str) -> None:
    kernel = find(name)
    built = kernel.build(WIDTH, SCALE, length=200, seed=5) if kernel.weight is None else None
    found = weights(kernel, drawn(0, 200, 2.0), drawn(1, 200, 2.0), SCALE, maps=built).detach()
    assert bool((found >= 0).all()) == kernel.positive


@pytest.mark.parametrize("name", NAMES)
def test_larger_scores_never_weigh_less_where_the_registry_says_so(name: str) -> None:
    kernel = find(name)
    # Large scores reach below -P, where (1 + s/P)^P rises again.
    q, k = drawn(2, 50, 3.0), drawn(3, 60, 3.0)
    visible = torch.ones(50, 60, dtype=torch.bool)
    found = rows(kernel, q, k)
    opposed = measures.discordance(measures.ranks(q @ k.mT, visible), measures.ranks(found, visible), visible)
    assert (float(opposed.max()) == 0) == kernel.monotone


def elu_twice(query: torch.Tensor) -> torch.Tensor:
    """The query whose elu(x) + 1 is twice that of `query`."""
    doubled = 2 * torch.where(query > 0, query + 1, query.exp())
    return torch.where(doubled > 1, doubled - 1, doubled.log())


ALIKE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "elu1": elu_twice,
    "hedgehog": lambda query: query + 0.7,
}


@pytest.mark.parametrize("name", NAMES)
def test_distinct_queries_have_distinct_rows_where_the_registry_says_so(name: str) -> None:
    kernel = find(name)
    q, k = drawn(4, 12), drawn(5, 60)
    alike = ALIKE.get(name, lambda query: 2 * query)
    both = torch.cat((q, alike(q)))
    found = rows(kernel, both, k)
    if kernel.injective:
        assert float(measures.nearest_rows(found[None], both[None])) > 1e-4
    else:
        assert float((found[:12] - found[12:]).abs().max()) <= 1e-12


def test_check_16_relu_cannot_tell_a_query_from_its_double_and_softmax_can() -> None:
    q, k = drawn(6, 20), drawn(7, 50)
    once, twice = rows(find("relu"), q, k), rows(find("relu"), 2 * q, k)
    assert float((once - twice).abs().max()) <= 1e-12
    assert float((rows(find("exp"), q, k) - rows(find("exp"), 2 * q, k)).abs().amax(-1).min()) > 1e-3


def unit(seed: int, count: int, width: int) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, width)))
    return x / x.norm(dim=-1, keepdim=True)


def estimates(m: int, seed: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """FAVOR+'s estimates of exp(x . y), pair by pair, with the powers of two put back."""
    phi = maps.Favor(x.shape[-1], 1.0, seed, count=m)
    left, right = phi(x), phi(y)
    assert left.exponents is not None and right.exponents is not None
    return (left.values * right.values).sum(-1) * torch.exp2(left.exponents + right.exponents)[:, 0]


def test_check_17_favor_is_unbiased_and_four_times_the_features_halve_its_error() -> None:
    x, y = unit(0, 64, 16), unit(1, 64, 16)
    truth = (x * y).sum(-1).exp()
    errors = {}
    for m in (64, 256):
        ratios = torch.stack([estimates(m, seed, x, y) / truth for seed in range(300)])
        errors[m] = float((ratios - 1).square().mean().sqrt())
        # Draws of one projection are dependent between pairs: the mean over pairs of each is one independent sample.
        means = ratios.mean(-1)
        assert abs(float(means.mean()) - 1) <= 4 * float(means.std()) / math.sqrt(300)
    assert 0.4 <= errors[256] / errors[64] <= 0.6


def test_hedgehogs_halves_are_softmaxes_of_the_unscaled_projection() -> None:
    x = drawn(8, 6)
    phi = maps.Hedgehog(WIDTH, SCALE)
    with torch.no_grad():
        phi.matrix.copy_(drawn(9, WIDTH)[None])
    mixed = x.numpy() @ phi.matrix[0].double().detach().numpy().T
    expected = np.concatenate([np.exp(s) / np.exp(s).sum(-1, keepdims=True) for s in (mixed, -mixed)], -1)
    found = phi(x)
    assert found.exponents is None
    np.testing.assert_allclose(found.values.detach(), expected, rtol=1e-10)
