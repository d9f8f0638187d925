"""Every linear-time form of every kernel against its quadratic form and against NumPy, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pomona.methods.attn_compare import kernels, linear
from pomona.methods.attn_compare.kernels import Kernel
from pomona.methods.attn_compare.maps import Features

LINEAR_TIME = [kernel for kernel in kernels.registered() if kernel.map is not None]
LENGTHS = (1, 63, 64, 65, 257, 1000)
HEADS, WIDTH = 2, 6
SCALE = 1 / math.sqrt(WIDTH)


def qkv(kernel: Kernel, n: int, seed: int = 0) -> list[Tensor]:
    """q, k and v (1, heads, n, d) in float64; of a kernel whose weights may cancel, such that they do not."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn((1, HEADS, n, WIDTH), generator=generator, dtype=torch.float64) for _ in range(3))
    if not kernel.positive and not kernel.subtractive:
        q, k = (0.2 + 0.2 * x.abs() for x in (q, k))
    return [x.requires_grad_() for x in (q, k, v)]


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def gradients(output: Tensor, inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=output.dtype)
    found = torch.autograd.grad(output, inputs, weights, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def apart(x: Tensor, y: Tensor) -> float:
    return float((x - y).detach().abs().max())


def build(kernel: Kernel, length: int) -> tuple[Any, Any]:
    first, second = kernel.build(WIDTH, SCALE, length=length, heads=HEADS)
    return first.double(), second.double()


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("kernel", LINEAR_TIME, ids=lambda kernel: kernel.name)
def test_chunks_recurrence_and_the_quadratic_form_agree_to_rounding(kernel: Kernel, n: int) -> None:
    inputs = q, k, v = qkv(kernel, n)
    of_queries, of_keys = build(kernel, n)
    matrix = kernels.attention(kernel, q, k, SCALE, visible=causal(n), maps=(of_queries, of_keys))
    quadratic = matrix @ v
    wanted = gradients(quadratic, inputs)
    forms = [
        linear.chunked(of_queries(q), of_keys(k), v, subtractive=kernel.subtractive),
        linear.chunked(of_queries(q), of_keys(k), v, chunk=17, subtractive=kernel.subtractive),
        linear.recurrent(of_queries(q), of_keys(k), v, subtractive=kernel.subtractive),
    ]
    for form in forms:
        assert apart(form, quadratic) <= 1e-12
        for found, expected in zip(gradients(form, inputs), wanted, strict=True):
            assert apart(found, expected) <= 1e-10


@pytest.mark.parametrize("n", (1, 65, 257))
@pytest.mark.parametrize("kernel", LINEAR_TIME, ids=lambda kernel: kernel.name)
def test_without_a_mask_every_query_sees_every_key(kernel: Kernel, n: int) -> None:
    inputs = q, k, v = qkv(kernel, n)
    of_queries, of_keys = build(kernel, n)
    quadratic = kernels.attention(kernel, q, k, SCALE, maps=(of_queries, of_keys)) @ v
    found = linear.full(of_queries(q), of_keys(k), v, subtractive=kernel.subtractive)
    assert apart(found, quadratic) <= 1e-12
    for one, other in zip(gradients(found, inputs), gradients(quadratic, inputs), strict=True):
        assert apart(one, other) <= 1e-10


def in_numpy(name: str, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
    """Causal attention of one head, row by row, from the kernel's formula."""
    found = np.zeros_like(v)
    for i, query in enumerate(q):
        s = k[: i + 1] @ query * SCALE
        if name == "inline":
            w = s - s.mean() + 1 / (i + 1)
            found[i] = w @ v[: i + 1]
            continue
        if name == "elu1":
            w = np.where(k[: i + 1] > 0, k[: i + 1] + 1, np.exp(k[: i + 1])) @ np.where(
                query > 0, query + 1, np.exp(query)
            )
        elif name == "taylor2":
            w = 1 + s + s * s / 2
        else:
            halves = [(np.exp(k[: i + 1] * t), np.exp(query * t)) for t in (1, -1)]
            w = sum((a / a.sum(-1, keepdims=True)) @ (b / b.sum()) for a, b in halves)
        found[i] = w @ v[: i + 1] / w.sum()
    return found


@pytest.mark.parametrize("name", ("elu1", "taylor2", "inline", "hedgehog"))
def test_the_chunked_form_is_the_formula_of_the_paper(name: str) -> None:
    kernel = kernels.find(name)
    q, k, v = qkv(kernel, 150)
    of_queries, of_keys = build(kernel, 150)
    found = linear.chunked(of_queries(q), of_keys(k), v, subtractive=kernel.subtractive).detach()
    for head in range(HEADS):
        expected = in_numpy(name, *(x[0, head].detach().numpy() for x in (q, k, v)))
        np.testing.assert_allclose(found[0, head].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("subtractive", (False, True))
@pytest.mark.parametrize("exponents", (False, True))
def test_the_backward_passes_gradcheck(exponents: bool, subtractive: bool) -> None:
    if exponents and subtractive:
        return
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.rand((2, 11, r), generator=generator, dtype=torch.float64) + 0.1 for r in (3, 3, 4))
    powers = torch.randint(-3, 4, (2, 11, 1), generator=generator).double() if exponents else None
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: linear.chunked(Features(q), Features(k, powers), v, chunk=4, subtractive=subtractive), inputs
    )


@pytest.mark.parametrize("kernel", LINEAR_TIME, ids=lambda kernel: kernel.name)
def test_a_token_touches_no_bit_of_an_earlier_output(kernel: Kernel) -> None:
    n, changed = 200, 101
    of_queries, of_keys = build(kernel, n)
    with torch.no_grad():
        q, k, v = qkv(kernel, n)
        before = linear.chunked(of_queries(q), of_keys(k), v, subtractive=kernel.subtractive)
        for x in (q, k, v):
            x[..., changed, :] *= -3000 if kernel.positive else 30
        after = linear.chunked(of_queries(q), of_keys(k), v, subtractive=kernel.subtractive)
    assert torch.equal(before[..., :changed, :], after[..., :changed, :])
    assert not torch.equal(before[..., changed:, :], after[..., changed:, :])


def test_keys_whose_weights_span_thousands_of_powers_of_two_stay_finite() -> None:
    n = 150
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.rand((1, n, 4), generator=generator, dtype=torch.float64) + 0.5 for _ in range(3))
    powers = torch.linspace(-4000, 4000, n, dtype=torch.float64).round()[None, :, None]
    powers[:, 70] = 4500  # from here on this key is all that counts
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found = linear.chunked(Features(q), Features(k, powers), v)
    rows = []
    for i in range(n):
        relative = powers[0, : i + 1, 0] - powers[0, : i + 1, 0].amax()
        w = k[0, : i + 1] @ q[0, i] * torch.exp2(relative)
        rows.append(w @ v[0, : i + 1] / w.sum())
    expected = torch.stack(rows)
    assert apart(found[0], expected) <= 1e-12
    assert apart(found[0, 70:], v[0, 70]) <= 1e-15
    for one, other in zip(gradients(found, inputs), gradients(expected[None], inputs), strict=True):
        assert torch.isfinite(one).all() and apart(one, other) <= 1e-10


def test_rows_whose_weights_sum_to_zero_are_zero_and_so_are_their_gradients() -> None:
    q, k, v = (torch.ones(1, 5, 2, dtype=torch.float64) for _ in range(3))
    k[:, :3] = 0
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found = linear.chunked(Features(q), Features(k), v, chunk=2)
    assert torch.equal(found[0, :3], torch.zeros(3, 2, dtype=torch.float64))
    assert torch.equal(found[0, 3:].detach(), torch.ones(2, 2, dtype=torch.float64))
    for gradient in gradients(found[:, :3], inputs):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_sums_what_half_precision_cannot_hold(dtype: torch.dtype) -> None:
    n = 3000
    q, k = (torch.full((1, n, 4), 8.0, dtype=dtype) for _ in range(2))  # n 8 8 4 = 768,000 > 65,504
    v = torch.linspace(-1, 1, n)[None, :, None].to(dtype)
    v.requires_grad_()
    for found in (linear.chunked(Features(q), Features(k), v), linear.recurrent(Features(q), Features(k), v)):
        expected = v.detach().double().cumsum(1) / torch.arange(1, n + 1)[None, :, None]
        assert found.dtype == dtype
        assert apart(found.double(), expected) <= 2 * torch.finfo(dtype).eps
    assert linear.State.of(Features(k), v).sums.dtype == torch.float32
    (gradient,) = torch.autograd.grad(linear.chunked(Features(q), Features(k), v).sum(), v)
    assert gradient.dtype == dtype and torch.isfinite(gradient).all()


def test_float32_is_as_near_to_float64_as_its_format_allows() -> None:
    kernel = kernels.find("elu1")
    q, k, v = (x.detach() for x in qkv(kernel, 1000))
    phi = kernel.build(WIDTH, SCALE, length=1000)[0]
    exact = linear.chunked(phi(q), phi(k), v)
    assert apart(linear.chunked(phi(q.float()), phi(k.float()), v.float()).double(), exact) <= 2e-6


def test_decoding_after_a_prefill_continues_the_sequence() -> None:
    for kernel in LINEAR_TIME:
        n, prefix = 40, 30
        q, k, v = (x.detach() for x in qkv(kernel, n))
        of_queries, of_keys = build(kernel, n)
        wanted = linear.chunked(of_queries(q), of_keys(k), v, subtractive=kernel.subtractive)
        state = linear.State.of(of_keys(k[..., :prefix, :]), v[..., :prefix, :], subtractive=kernel.subtractive)
        size = state.nbytes
        for i in range(prefix, n):
            query, key = (m(x[..., i : i + 1, :], start=i) for m, x in ((of_queries, q), (of_keys, k)))
            found, state = state.step(query, key, v[..., i : i + 1, :])
            assert apart(found, wanted[..., i : i + 1, :]) <= 1e-12, kernel.name
        assert state.nbytes == size == 8 * HEADS * kernel.features(WIDTH) * (WIDTH + 1)  # type: ignore[operator]


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made meanwhile held."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else (found,):
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().size() // x.element_size())
        return found


def test_memory_grows_with_n_times_d_not_with_the_states_of_all_positions() -> None:
    n, r, d = 4096, 8, 8
    q, k, v = (torch.rand(1, n, size, requires_grad=True) for size in (r, r, d))
    with Largest() as largest:
        gradients(linear.chunked(Features(q), Features(k), v), [q, k, v])
    assert largest.numbers == n * d


def test_subtracting_needs_features_without_exponents() -> None:
    q, v = torch.ones(1, 3, 2), torch.ones(1, 3, 2)
    with pytest.raises(ValueError, match="scale does not cancel"):
        linear.chunked(Features(q), Features(q, torch.ones(1, 3, 1)), v, subtractive=True)


def test_the_quadratic_form_has_gradients_where_weights_sum_to_zero() -> None:
    kernel = kernels.find("relu")
    q, k = torch.tensor([[-1.0], [1.0]], dtype=torch.float64), torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    q.requires_grad_()
    rows = kernels.attention(kernel, q, k, 1.0)
    assert rows.tolist() == [[0, 0], [1 / 3, 2 / 3]]
    (gradient,) = torch.autograd.grad(rows[:, 0].sum(), q)
    assert torch.isfinite(gradient).all()
