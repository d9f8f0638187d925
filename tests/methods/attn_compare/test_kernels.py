"""Each kernel against its formula in NumPy, written from the paper it comes from."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pomona.errors import UsageError
from pomona.methods.attn_compare.kernels import (
    attention,
    chosen,
    find,
    inner_products,
    normalised,
    registered,
)

WIDTH, SCALE = 6, 6**-0.5
every_kernel = pytest.mark.parametrize("name", [kernel.name for kernel in registered()])


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def draw(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape) * size)


def features(name: str, x: np.ndarray) -> np.ndarray:
    """phi of x (n, d), by the formula."""
    if name == "elu1":
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    if name == "relu":
        return np.maximum(x, 0)
    if name == "relu2":
        return np.maximum(x, 0) ** 2
    if name == "cosformer":
        angle = np.pi / 2 * np.arange(len(x))[:, None] / len(x)
        return np.hstack((np.maximum(x, 0) * np.cos(angle), np.maximum(x, 0) * np.sin(angle)))
    if name == "dpfp:1":
        both = np.maximum(np.hstack((x, -x)), 0)
        return np.array([[row[j] * row[(j + 1) % len(row)] for j in range(len(row))] for row in both])
    if name == "hedgehog":
        return np.hstack([np.exp(y) / np.exp(y).sum(1, keepdims=True) for y in (x, -x)])
    raise KeyError(name)


SCORES = {
    "exp": np.exp,
    "uniform": np.ones_like,
    "linear": lambda s: s,
    "taylor2": lambda s: 1 + s + s * s / 2,
    "pow:4": lambda s: s**4,
    "euler:8": lambda s: (1 + s / 8) ** 8,
}


@pytest.mark.parametrize("name", ["elu1", "relu", "relu2", "cosformer", "dpfp:1", "hedgehog"])
def test_a_feature_map_gives_the_rows_of_its_formula(name: str) -> None:
    q, k = draw(9, WIDTH, seed=1), draw(9, WIDTH, seed=2)
    raw = features(name, q.numpy()) @ features(name, k.numpy()).T
    for visible in (None, torch.ones(9, 9).tril().bool()):
        seen = raw if visible is None else raw * visible.numpy()
        expected = seen / np.where(seen.sum(1, keepdims=True) == 0, 1, seen.sum(1, keepdims=True))
        found = attention(find(name), q, k, SCALE, visible=visible)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-14)


@pytest.mark.parametrize("name", SCORES)
def test_a_kernel_of_the_scores_gives_the_rows_of_its_formula(name: str) -> None:
    q, k = draw(9, WIDTH, seed=1), draw(9, WIDTH, seed=2)
    raw = SCORES[name](q.numpy() @ k.numpy().T * SCALE)
    for visible in (None, torch.ones(9, 9).tril().bool()):
        seen = raw if visible is None else raw * visible.numpy()
        found = attention(find(name), q, k, SCALE, visible=visible)
        np.testing.assert_allclose(found.numpy(), seen / seen.sum(1, keepdims=True), rtol=1e-10, atol=1e-13)


def test_inline_subtracts_the_mean_instead_of_dividing_by_the_sum() -> None:
    q, k = draw(5, WIDTH, seed=1), draw(5, WIDTH, seed=2)
    scores = (q @ k.T).numpy() * SCALE
    visible = np.tril(np.ones((5, 5), bool))
    expected = np.array([[s[j] - s[: i + 1].mean() + 1 / (i + 1) for j in range(5)] for i, s in enumerate(scores)])
    found = attention(find("inline"), q, k, SCALE, visible=torch.from_numpy(visible))
    np.testing.assert_allclose(found.numpy(), expected * visible, atol=1e-14)


@pytest.mark.parametrize("name", ["uniform", "linear", "taylor2", "pow:2", "euler:2", "inline"])
def test_the_features_of_a_kernel_of_the_scores_give_its_weights(name: str) -> None:
    kernel = find(name)
    q, k = draw(2, 7, WIDTH, seed=1), draw(2, 7, WIDTH, seed=2)
    of_queries, of_keys = kernel.build(WIDTH, SCALE, length=7)
    found = normalised(kernel, inner_products(of_queries(q), of_keys(k)))
    np.testing.assert_allclose(found, attention(kernel, q, k, SCALE), rtol=1e-10, atol=1e-12)


@every_kernel
def test_the_number_of_features_is_what_the_registry_says(name: str) -> None:
    kernel = find(name)
    if kernel.map is None:
        return
    phi, _ = kernel.build(WIDTH, SCALE, length=8)
    assert phi(draw(8, WIDTH)).values.shape == (8, kernel.features(WIDTH)) and phi.count == kernel.features(WIDTH)


def test_features_of_powers_are_counted_as_monomials() -> None:
    assert find("taylor2").features(64) == 2145 and find("taylor2").features(16) == 153
    assert find("euler:4").features(64) == 814_385 and find("euler:8").features(64) == math.comb(72, 8)
    assert find("pow:4").features(3) == len({tuple(sorted((a, b, c, d))) for a, b, c, d in np.ndindex(3, 3, 3, 3)})


@pytest.mark.parametrize("name", ["favor:4096", "rfa:4096"])
def test_random_features_tend_to_the_exponential(name: str) -> None:
    q, k = draw(4, WIDTH, seed=1) / 2, draw(5, WIDTH, seed=2) / 2
    kernel, found = find(name), []
    for seed in range(30):
        phi, _ = kernel.build(WIDTH, 1.0, length=5, seed=seed)
        a, b = phi(q), phi(k)
        found.append((a.values * 2**a.exponents) @ (b.values * 2**b.exponents).mT)
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / 30**0.5
    assert ((mean - (q @ k.mT).exp()).abs() < 4 * error + 1e-12).all() and (error / mean).max() < 0.06


def test_a_sketch_of_degree_four_has_the_mean_that_its_formula_gives_and_is_never_negative() -> None:
    """With z = (g q)(g k)(h q)(h k) for Gaussian g and h, E z = s**2 and E z**2 = (|q|**2 |k|**2 + 2 s**2)**2."""
    q, k = draw(3, WIDTH, seed=1), draw(4, WIDTH, seed=2)
    kernel, found = find("polysketch:4"), []
    for seed in range(4000):
        phi, _ = kernel.build(WIDTH, 1.0, length=4, seed=seed)
        found.append(inner_products(phi(q), phi(k)))
    sketches = torch.stack(found)
    assert (sketches >= 0).all()
    s = q @ k.mT
    second = (q.square().sum(-1)[:, None] * k.square().sum(-1) + 2 * s**2) ** 2
    expected = s**4 * (1 - 1 / 16) + second / 16
    error = sketches.std(0) / 4000**0.5
    assert ((sketches.mean(0) - expected).abs() < 5 * error).all() and (error / expected).max() < 0.3


@every_kernel
def test_rows_sum_to_one_and_look_only_where_they_may(name: str) -> None:
    visible = torch.ones(12, 12).tril().bool()
    rows = attention(find(name), draw(2, 12, WIDTH, seed=1), draw(2, 12, WIDTH, seed=2), SCALE, visible=visible)
    total = rows.sum(-1)
    assert ((total - 1).abs() < 1e-10).logical_or(total == 0).all() and (rows[..., ~visible] == 0).all()
    assert (total[..., 4:] != 0).all()


@every_kernel
def test_a_key_that_stands_for_several_weighs_as_much_as_they_do(name: str) -> None:
    kernel = find(name)
    if kernel.positional:
        return
    q, k = draw(3, WIDTH, seed=1), draw(3, WIDTH, seed=2)
    counts = torch.tensor([1, 4, 2])
    whole = attention(kernel, q, k.repeat_interleave(counts, 0), SCALE)
    merged = attention(kernel, q, k, SCALE, counts=counts)
    expected = torch.stack([part.sum(-1) for part in whole.split(counts.tolist(), -1)], -1)
    np.testing.assert_allclose(merged, expected, atol=1e-12)


@every_kernel
@pytest.mark.parametrize("size", [1e-3, 30.0, 1000.0])
def test_rows_stay_finite_for_small_and_huge_heads(name: str, size: float) -> None:
    visible = torch.ones(12, 12).tril().bool()
    q, k = draw(12, WIDTH, seed=1, size=size), draw(12, WIDTH, seed=2, size=size)
    rows = attention(find(name), q, k, SCALE, visible=visible)
    assert rows.isfinite().all()


@every_kernel
def test_later_keys_never_touch_the_bits_of_earlier_rows(name: str) -> None:
    kernel = find(name)
    visible = torch.ones(20, 20).tril().bool()
    q, k = draw(20, WIDTH, seed=1), draw(20, WIDTH, seed=2)
    before = attention(kernel, q, k, SCALE, visible=visible)
    k[11] *= 400.0  # an outlier that decides the scale of everything after it
    after = attention(kernel, q, k, SCALE, visible=visible)
    assert torch.equal(before[:11, :11], after[:11, :11])
    assert torch.equal(before[11:], after[11:]) == (name == "uniform")


def test_a_row_without_any_weight_is_zero_and_not_a_number() -> None:
    found = normalised(find("relu"), torch.tensor([[0.0, 0.0], [1.0, 3.0]]))
    assert found.tolist() == [[0, 0], [0.25, 0.75]]


def test_lists_of_kernels_name_each_once_and_expand_ranges() -> None:
    assert [k.name for k in chosen(" exp, pow:2..8,pow:4 ,favor")] == [
        "exp",
        "pow:2",
        "pow:4",
        "pow:6",
        "pow:8",
        "favor:256",
    ]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("hedghog", "no such kernel", "hedgehog"),
        ("zzz", "no such kernel", "--list-kernels"),
        ("elu1:3", "takes no parameter", None),
        ("favor:0", "whole number", None),
        ("favor:-1", "whole number", None),
        ("favor:1e9", "whole number", None),
        ("favor:٣", "whole number", None),
        ("pow:3", "even", None),
        ("euler:5", "even", None),
        ("rfa:7", "pairs", None),
        ("polysketch:6", "power of two", None),
        ("pow:8..2", "LOW..HIGH", None),
        ("pow:2..", "LOW..HIGH", None),
        (" , ", "no kernel", "--list-kernels"),
    ],
)
def test_a_wrong_name_is_refused_with_the_way_out(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        chosen(text)
    assert hint is None or hint in (caught.value.hint or "")


def test_the_map_of_positions_refuses_what_lies_beyond_its_length() -> None:
    phi, _ = find("cosformer").build(WIDTH, SCALE, length=4)
    phi(draw(2, WIDTH), start=2)
    with pytest.raises(ValueError, match="position 4"):
        phi(draw(2, WIDTH), start=3)
