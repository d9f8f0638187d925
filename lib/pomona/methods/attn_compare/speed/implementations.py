"""What is timed: softmax as people run it, and linear attention in the forms that have been published.

Every one is first held against the quadratic form in float64 (`proof`), at a length that no chunk divides.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pomona.methods.attn_compare import kernels, linear
from pomona.methods.attn_compare.kernels import Kernel
from pomona.methods.attn_compare.maps import FeatureMap, Features
from pomona.methods.attn_compare.speed import costs

PROOF_LENGTH = 257
_PROOF_HEADS = 2
CHUNKS = (32, 64, 128, 256)
PREFILL = 1024  # keys that go into a state at once, before a step is timed

Mixer = Callable[[Features, Features, Tensor, int], Tensor]


@dataclass(frozen=True)
class Implementation:
    """A form of attention with a kernel.

    Attributes:
        form: as `costs` knows it.
        kernel: exp of softmax.
        causal: queries see no later key.
    """

    form: str
    kernel: Kernel
    causal: bool = True

    @property
    def name(self) -> str:
        return self.form if self.kernel.exact else f"{self.form} {self.kernel.name}"

    @property
    def tolerance(self) -> float:
        """Of the largest difference from the float64 reference, relative to the largest number in it."""
        return 1e-4 if self.form == "flex" else 1e-10

    def features(self, width: int) -> int:
        """r, as it is computed: 0 of softmax."""
        return 0 if self.kernel.exact else self.kernel.features(width) or 0

    def maps(self, width: int, length: int, like: Tensor) -> tuple[FeatureMap, FeatureMap] | None:
        """phi of queries and keys, in the number format and place of `like`; None of softmax."""
        if self.kernel.exact:
            return None
        made = self.kernel.build(width, 1 / math.sqrt(width), length=length, heads=like.shape[1], device=like.device)
        first, second = (m.to(like.dtype).requires_grad_(False) for m in made)
        return first, second

    def attend(self, q: Tensor, k: Tensor, v: Tensor, maps: tuple[FeatureMap, FeatureMap] | None, chunk: int) -> Tensor:
        """Outputs (1, heads, n, d) of q, k, v (1, heads, n, d)."""
        if maps is None:
            return SOFTMAX[self.form](q, k, v, self.causal)
        return self.mix(maps[0](q), maps[1](k), v, chunk)

    def mix(self, queries: Features, keys: Features, v: Tensor, chunk: int) -> Tensor:
        """Outputs of features: what is left once the maps are counted out."""
        if self.kernel.subtractive:
            if self.form == "chunked":
                return linear.chunked(queries, keys, v, chunk=chunk, subtractive=True)
            return linear.full(queries, keys, v, subtractive=True)
        return LINEAR[self.form](queries, keys, v, chunk, self.causal)

    def decoder(
        self, q: Tensor, k: Tensor, v: Tensor, maps: tuple[FeatureMap, FeatureMap] | None
    ) -> Callable[[], Tensor]:
        """One step of decoding: the output (1, heads, 1, d) of the last of n tokens, the others having gone before."""
        last_q, last_k, last_v = (x[..., -1:, :].clone() for x in (q, k, v))
        n = q.shape[-2]
        if maps is None:
            attend = SOFTMAX[self.form]

            def step() -> Tensor:
                k[..., -1:, :], v[..., -1:, :] = last_k, last_v
                return attend(last_q, k, v, False)

            return step
        of_queries, of_keys = maps
        state: linear.State | None = None
        for start in range(0, n - 1, PREFILL):
            some = slice(start, min(start + PREFILL, n - 1))
            keys, values = of_keys(k[..., some, :], start=start), v[..., some, :]
            state = (
                state.after(keys, values)
                if state
                else linear.State.of(keys, values, subtractive=self.kernel.subtractive)
            )
        if state is None:
            return lambda: linear.State.of(of_keys(last_k), last_v, subtractive=self.kernel.subtractive).read(
                of_queries(last_q)
            )
        before = state
        return lambda: before.step(of_queries(last_q, start=n - 1), of_keys(last_k, start=n - 1), last_v)[0]


def chosen(forms: Sequence[str], kernels: Sequence[Kernel], way: str, *, causal: bool) -> list[Implementation]:
    """The implementations of a pass; a kernel without a map is there once, to be told of as unavailable."""
    linear_time = [kernel for kernel in kernels if not kernel.exact]
    found = []
    for form in forms:
        if form in SOFTMAX:
            if way != "decode" or form != "flex":
                found.append(Implementation(form, _exact(), causal))
            continue
        if way == "decode":
            form = {"chunked": "state"}.get(form, "")
        elif not causal:
            form = {"chunked": "full", "quadratic": "quadratic"}.get(form, "")
        for kernel in linear_time if form else ():
            if form in ("chunked", "full", "state") or not (kernel.subtractive or kernel.map is None):
                found.append(Implementation(form, kernel, causal))
    return found


def unavailable(implementation: Implementation, way: str, device: str) -> str | None:
    """Why an implementation cannot run here; None where it can."""
    if implementation.kernel.map is None and not implementation.kernel.exact:
        return "has no feature map of a size that is of use, so no linear-time form"
    if implementation.form != "flex" or device.startswith("cuda"):
        return None
    if way != "fwd":
        return "flex attention has no backward on a processor"
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "flex attention on a processor needs a C++ compiler"
    return None


def inputs(length: int, width: int, heads: int, *, seed: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v (1, heads, n, d), Gaussian, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn((1, heads, length, width), generator=generator) for _ in range(3))
    return [x.to(device, dtype) for x in draw]


def proof(implementation: Implementation, way: str, width: int, *, seed: int, device: str) -> float:
    """The largest difference from the quadratic form in float64, over outputs and gradients, at every chunk.

    Relative to the largest number of the reference, where that is above one.
    """
    kernel = implementation.kernel
    dtype = torch.float32 if implementation.form == "flex" else torch.float64
    given = inputs(PROOF_LENGTH, width, _PROOF_HEADS, seed=seed, dtype=dtype, device=device)
    if not kernel.positive and not kernel.subtractive:  # whose weights may sum to next to nothing
        given[:2] = [0.2 + 0.2 * x.abs() for x in given[:2]]
    exact = [x.double() for x in given]
    maps, exact_maps = (implementation.maps(width, PROOF_LENGTH, x[0]) for x in (given, exact))
    train = way == "train"
    visible = None
    if implementation.causal:
        visible = torch.ones(PROOF_LENGTH, PROOF_LENGTH, dtype=torch.bool, device=device).tril()

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.attention(kernel, q, k, 1 / math.sqrt(width), visible=visible, maps=exact_maps) @ v

    def attempt(chunk: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: implementation.attend(q, k, v, maps, chunk)

    if way == "decode":
        expected = [reference(*exact)[..., -1:, :]]
        found = [[implementation.decoder(given[0], given[1], given[2], maps)()]]
    else:
        expected = _results(reference, exact, train)
        sizes = CHUNKS if implementation.form in ("chunked", "batched") else CHUNKS[:1]
        found = [_results(attempt(chunk), given, train) for chunk in sizes]
    return max(
        float((one.double() - other).abs().max() / max(1.0, float(other.abs().max())))
        for each in found
        for one, other in zip(each, expected, strict=True)
    )


def proof_bytes(implementation: Implementation, way: str, width: int) -> int:
    """What `proof` is predicted to hold."""
    return costs.nbytes(implementation.form, way, shape(implementation, PROOF_LENGTH, width, _PROOF_HEADS, 8))


def _results(attend: Callable[[Tensor, Tensor, Tensor], Tensor], given: list[Tensor], train: bool) -> list[Tensor]:
    """The output, and the gradients of its inner product with v."""
    if not train:
        with torch.no_grad():
            return [attend(given[0], given[1], given[2])]
    leaves = [x.detach().requires_grad_() for x in given]
    output = attend(leaves[0], leaves[1], leaves[2])
    found = torch.autograd.grad(output, leaves, given[2], allow_unused=True, materialize_grads=True)
    return [output.detach(), *found]


# --- softmax ---------------------------------------------------------------------------------------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _eager(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]))
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores = scores.masked_fill_(later, -torch.inf)
    return torch.softmax(scores, -1) @ v


def _flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = _block_mask(create_block_mask, q.shape[-2], str(q.device)) if causal else None
    found: Tensor = _compiled_flex()(q, k, v, block_mask=mask)
    return found


@functools.cache
def _block_mask(create: Callable[..., object], length: int, device: str) -> object:
    return create(lambda b, h, i, j: i >= j, None, None, length, length, device=device)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


SOFTMAX: dict[str, Callable[[Tensor, Tensor, Tensor, bool], Tensor]] = {
    "sdpa": _sdpa,
    "eager": _eager,
    "flex": _flex,
}


# --- linear ----------------------------------------------------------------------------------------------------------


def _chunked(queries: Features, keys: Features, v: Tensor, chunk: int, causal: bool) -> Tensor:
    return linear.chunked(queries, keys, v, chunk=chunk)


def _full(queries: Features, keys: Features, v: Tensor, chunk: int, causal: bool) -> Tensor:
    return linear.full(queries, keys, v)


def _batched(queries: Features, keys: Features, v: Tensor, chunk: int, causal: bool) -> Tensor:
    """All chunks at once: a running sum over the states of all of them, one batch of masked scores."""
    n, width = v.shape[-2:]
    padded = (
        functional.pad(x, (0, 0, 0, -n % chunk)) for x in (queries.values, _at_one_scale(keys), linear.with_ones(v))
    )
    q, k, extended = (x.view(*x.shape[:-2], -1, chunk, x.shape[-1]) for x in padded)
    states = (k.mT @ extended).cumsum(-3)
    before = functional.pad(states[..., :-1, :, :], (0, 0, 0, 0, 1, 0))
    sums = (q @ k.mT).tril_() @ extended + q @ before
    return _divided(sums.flatten(-3, -2)[..., :n, :], width)


def _quadratic(queries: Features, keys: Features, v: Tensor, chunk: int, causal: bool) -> Tensor:
    """Masked scores of all pairs."""
    scores = queries.values @ _at_one_scale(keys).mT
    return _divided((scores.tril_() if causal else scores) @ linear.with_ones(v), v.shape[-1])


def _prefix_sum(queries: Features, keys: Features, v: Tensor, chunk: int, causal: bool) -> Tensor:
    """The running sum of the outer products of all positions, as textbooks have it."""
    states = (_at_one_scale(keys)[..., None] * linear.with_ones(v)[..., None, :]).cumsum(-3)
    return _divided((queries.values[..., None, :] @ states)[..., 0, :], v.shape[-1])


LINEAR: dict[str, Callable[[Features, Features, Tensor, int, bool], Tensor]] = {
    "chunked": _chunked,
    "full": _full,
    "batched": _batched,
    "quadratic": _quadratic,
    "prefix-sum": _prefix_sum,
}


def _at_one_scale(keys: Features) -> Tensor:
    """Keys on the scale of the largest, as these forms need them; a later key then rounds earlier outputs."""
    return linear.at_one_scale(keys, keys.values.dtype)[0]


def _divided(sums: Tensor, width: int) -> Tensor:
    totals = sums[..., width:]
    return sums[..., :width] / totals.masked_fill(totals == 0, torch.inf)


@functools.cache
def _exact() -> Kernel:
    return kernels.find("exp")


def shape(implementation: Implementation, length: int, width: int, heads: int, itemsize: int) -> costs.Shape:
    """What `costs` must know of it."""
    features = implementation.features(width)
    return costs.Shape(heads, length, width, features, itemsize, implementation.causal)
