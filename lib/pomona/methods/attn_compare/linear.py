"""Linear attention over features: time that grows with the length, and a state that does not grow at all.

A query's output is sum_j w_ij v_j / sum_j w_ij with w_ij = phi(q_i) . phi(k_j). Both sums come out of the same products
once a column of ones is appended to v, making it e = d + 1 wide, and what the keys seen so far contribute to either is
one matrix of r x e numbers, S = sum_j phi(k_j) [v_j, 1]. The forms differ in how they go through the keys:

    recurrent   a key at a time, as decoding does; the reference
    chunked     a chunk of C keys at a time: masked scores within the chunk, S for all keys before it
    full        all keys at once, for attention that is not causal

The quadratic form is `kernels.attention`. Where features carry exponents, S carries the largest of its keys' and every
query is scaled by the largest of the keys that it sees: exactly, and without a later key touching an earlier output.
Sums are kept in float32 at least: keys in half precision overflow when they are summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pomona.methods.attn_compare.maps import Features

CHUNK = 64


def chunked(queries: Features, keys: Features, v: Tensor, *, chunk: int = CHUNK, subtractive: bool = False) -> Tensor:
    """Causal attention in n (2C (r + e) + 4re) FLOPs and O(nd + C² + re) memory, forward and backward.

    Args:
        queries: phi(q), values (..., n, r); exponents play no part, they scale rows.
        keys: phi(k), values (..., n, r).
        v: (..., n, d).
        chunk: C; it need not divide n.
        subtractive: rows are made to sum to one by w - mean(w) + 1/N, not by division.

    Returns:
        (..., n, d) in the number format of v; rows are zero where the weights sum to zero.
    """
    n, width = v.shape[-2:]
    exponents = _relevant(queries, keys, subtractive)
    shaped = (x.reshape(-1, n, x.shape[-1]) for x in (queries.values, keys.values, v))
    if exponents is not None:
        exponents = exponents.reshape(-1, n, 1)
    found: Tensor = _Chunked.apply(*shaped, exponents, chunk, not subtractive)  # type: ignore[no-untyped-call]
    if subtractive:
        counts = torch.arange(1, n + 1, dtype=found.dtype, device=v.device)[:, None]
        means = v.reshape(-1, n, width).to(found.dtype).cumsum(-2) / counts
        found = (found[..., :width] + means * (1 - found[..., width:])).to(v.dtype)
    return found.view(v.shape)


def recurrent(queries: Features, keys: Features, v: Tensor, *, subtractive: bool = False) -> Tensor:
    """The same as `chunked`, token by token."""
    state, found = None, []
    for i in range(v.shape[-2]):
        query, key, value = position(queries, i), position(keys, i), v[..., i : i + 1, :]
        state = State.of(key, value, subtractive=subtractive) if state is None else state.after(key, value)
        found.append(state.read(query))
    return torch.cat(found, -2)


def position(features: Features, i: int) -> Features:
    """The features of position i alone, (..., 1, r)."""
    values, exponents = features
    return Features(values[..., i : i + 1, :], None if exponents is None else exponents[..., i : i + 1, :])


def full(queries: Features, keys: Features, v: Tensor, *, subtractive: bool = False) -> Tensor:
    """Attention of every query (..., n, r) to every key (..., m, r), in 2re (n + m) FLOPs."""
    if subtractive:
        return State.of(keys, v, subtractive=True).read(queries)
    of_keys, _ = at_one_scale(keys, _summed(v))
    of_queries = queries.values.to(of_keys.dtype)
    totals = of_queries @ of_keys.sum(-2)[..., None]
    # Queries are divided, not outputs, and by a product: the last to touch memory is then the matrix product.
    shares = of_queries * totals.masked_fill(totals == 0, torch.inf).reciprocal()
    return (shares @ (of_keys.mT @ v.to(of_keys.dtype))).to(queries.values.dtype)


@dataclass(frozen=True)
class State:
    """What linear attention remembers of the keys so far.

    Attributes:
        sums: (..., r, e), phi(k) [v, 1] / 2**peak, summed over keys; float32 at least.
        peak: (..., 1, 1), the largest exponent of a key so far; None stands for zero.
        values: (..., 1, d), v summed over keys, which subtractive kernels need as well.
        count: of keys.
    """

    sums: Tensor
    peak: Tensor | None
    values: Tensor | None
    count: int

    @classmethod
    def of(cls, keys: Features, v: Tensor, *, subtractive: bool = False) -> State:
        """The state after keys (..., m, r) and values (..., m, d)."""
        of_keys, peak = at_one_scale(keys, _summed(v))
        v = v.to(of_keys.dtype)
        return cls(of_keys.mT @ with_ones(v), peak, v.sum(-2, keepdim=True) if subtractive else None, v.shape[-2])

    def after(self, keys: Features, v: Tensor) -> State:
        """The state after more keys (..., m, r) with their values (..., m, d)."""
        of_keys, sums, peak = keys.values.to(self.sums.dtype), self.sums, self.peak
        if peak is not None and keys.exponents is not None:
            exponents, before = keys.exponents.to(sums.dtype), peak
            peak = torch.maximum(before, exponents.amax(-2, keepdim=True))
            sums, of_keys = sums * torch.exp2(before - peak), of_keys * torch.exp2(exponents - peak)
        v, count = v.to(sums.dtype), v.shape[-2]
        values = None if self.values is None else self.values + v.sum(-2, keepdim=True)
        one = count == 1  # an outer product: no need to find a matrix product's way
        extended = with_ones(v)
        sums = torch.addcmul(sums, of_keys.mT, extended) if one else sums + of_keys.mT @ extended
        return State(sums, peak, values, self.count + count)

    def read(self, queries: Features) -> Tensor:
        """Outputs (..., n, d) of queries (..., n, r) that see all keys so far, in the queries' number format."""
        found = queries.values.to(self.sums.dtype) @ self.sums
        sums, totals = found[..., :-1], found[..., -1:]
        if self.values is None:
            found = sums / totals.masked_fill(totals == 0, torch.inf)
        else:
            found = sums + self.values / self.count * (1 - totals)
        return found.to(queries.values.dtype)

    def step(self, query: Features, key: Features, v: Tensor) -> tuple[Tensor, State]:
        """One step of decoding: the token's output (..., 1, d), and the state for the next."""
        state = self.after(key, v)
        return state.read(query), state

    @property
    def nbytes(self) -> int:
        """Memory of the sums, with the normaliser's."""
        return self.sums.nbytes


class _Chunked(torch.autograd.Function):
    """q, k (b, n, r), v (b, n, d), exponents of k (b, n, 1) -> outputs (b, n, d), or sums (b, n, e) if not `divide`.

    Per chunk, with A = tril(Q Kᵀ), G = tril(dN Vᵀ), N the sums and R = sum of Qᵀ dN over the chunks that follow:

        N = A V + Q S      dQ = G K + dN Sᵀ      dK = Gᵀ Q + V Rᵀ      dV = Aᵀ dN + K R

    The backward goes through the chunks once forward, with S and all that stays within a chunk, and once in reverse,
    with R; nothing is kept per chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, exponents: Tensor | None, chunk: int, divide: bool
    ) -> Tensor:
        (batch, n, r), width = q.shape, v.shape[-1]
        scales = _Scales.of(exponents, v)
        summed = _summed(v)
        out = torch.empty((batch, n, width), dtype=v.dtype, device=v.device) if divide else None
        kept = torch.empty((batch, n, 1 if divide else width + 1), dtype=summed, device=v.device)
        state = torch.zeros((batch, r, width + 1), dtype=summed, device=v.device)
        work = _Work(batch, min(chunk, n), width, v)
        for a in range(0, n, chunk):
            b = min(a + chunk, n)
            work.fit(b - a)
            of_queries, of_keys, values = q[:, a:b].to(summed), k[:, a:b].to(summed), work.with_ones(v[:, a:b])
            scores = scales.within(torch.bmm(of_queries, of_keys.mT, out=work.scores), a, b)
            sums = torch.bmm(scores, values, out=work.sums)
            if a:
                sums.baddbmm_(scales.from_before(of_queries, a, b), state)
            if b < n:
                scales.fade(state, a, b).baddbmm_(scales.into(of_keys, a, b).mT, values)
            if out is None:
                kept[:, a:b] = sums
                continue
            totals = kept[:, a:b]
            totals.copy_(sums[..., width:]).masked_fill_(totals == 0, torch.inf)
            if out.dtype == summed:
                torch.div(sums[..., :width], totals, out=out[:, a:b])
            else:
                out[:, a:b] = sums[..., :width] / totals
        ctx.chunk = chunk
        ctx.save_for_backward(q, k, v, exponents, *(() if out is None else (out, kept)))
        return kept if out is None else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, exponents, *normalised = ctx.saved_tensors
        (batch, n, r), width, chunk = q.shape, v.shape[-1], ctx.chunk
        scales = _Scales.of(exponents, v)
        summed = _summed(v)
        dq, dk, dv = (torch.empty(x.shape, dtype=summed, device=x.device) for x in (q, k, v))
        work = _Work(batch, min(chunk, n), width, v, r)
        bounds = [(a, min(a + chunk, n)) for a in range(0, n, chunk)]

        def of_sums(a: int, b: int) -> Tensor:
            if not normalised:
                return gradient[:, a:b]
            out, totals = (x[:, a:b] for x in normalised)
            found = work.sums
            torch.div(gradient[:, a:b].to(summed), totals, out=found[..., :width])
            torch.sum(found[..., :width] * out, -1, keepdim=True, out=found[..., width:]).neg_()
            return found

        state = torch.zeros((batch, r, width + 1), dtype=summed, device=v.device)
        for a, b in bounds:
            work.fit(b - a)
            of_queries, of_keys = q[:, a:b].to(summed), k[:, a:b].to(summed)
            values, dsums = work.with_ones(v[:, a:b]), of_sums(a, b)
            dscores = scales.within(torch.bmm(dsums, values.mT, out=work.scores), a, b)
            dk[:, a:b] = torch.bmm(dscores.mT, of_queries, out=work.features)
            dqueries = torch.bmm(dscores, of_keys, out=work.features)
            if a:
                dqueries.baddbmm_(scales.from_before(dsums, a, b), state.mT)
            dq[:, a:b] = dqueries
            scores = scales.within(torch.bmm(of_queries, of_keys.mT, out=work.scores), a, b)
            dv[:, a:b] = torch.bmm(scores.mT, dsums, out=work.products)[..., :width]
            if b < n:
                scales.fade(state, a, b).baddbmm_(scales.into(of_keys, a, b).mT, values)

        later = state.zero_()
        for a, b in reversed(bounds):
            work.fit(b - a)
            if b < n:
                values, of_keys = work.with_ones(v[:, a:b]), k[:, a:b].to(summed)
                dk[:, a:b] += torch.bmm(scales.to_after(values, a, b), later.mT, out=work.features)
                dv[:, a:b] += torch.bmm(scales.to_after(of_keys, a, b), later, out=work.products)[..., :width]
            if a:
                of_queries = scales.back(q[:, a:b].to(summed), a, b)
                scales.fade_back(later, a, b).baddbmm_(of_queries.mT, of_sums(a, b))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


class _Work:
    """What every chunk writes anew, kept so that nothing is allocated within the loop.

    Products go here first and are copied from here: written straight into a slice of a result, a batch of them is made
    one by one.
    """

    def __init__(self, batch: int, size: int, width: int, like: Tensor, features: int = 0) -> None:
        self.batch, self.width, self.like, self.count = batch, width, like, features
        self.fit(size)

    def fit(self, size: int) -> None:
        """Hold chunks of this size; only the last may differ from the others."""
        if getattr(self, "size", None) == size:
            return
        self.size = size
        kind: Any = {"dtype": _summed(self.like), "device": self.like.device}
        self.scores = torch.empty((self.batch, size, size), **kind)
        self.sums = torch.empty((self.batch, size, self.width + 1), **kind)
        self.products = torch.empty((self.batch, size, self.width + 1), **kind) if self.count else self.sums
        self.features = torch.empty((self.batch, size, self.count), **kind)
        self.values = torch.ones((self.batch, size, self.width + 1), **kind)

    def with_ones(self, v: Tensor) -> Tensor:
        self.values[..., : self.width] = v
        return self.values


@dataclass(frozen=True)
class _Scales:
    """The powers of two between the scale of a key, 2**exponent, and that of a query, 2**peak of the keys it sees.

    No factor exceeds one. Everything is as it comes where keys have no exponents.

    Attributes:
        exponents: (b, n, 1) of keys.
        peaks: (b, n, 1), the largest exponent up to each position.
    """

    exponents: Tensor | None
    peaks: Tensor | None

    @classmethod
    def of(cls, exponents: Tensor | None, v: Tensor) -> _Scales:
        if exponents is None:
            return cls(None, None)
        exponents = exponents.to(_summed(v))
        return cls(exponents, exponents.cummax(-2).values)

    def within(self, scores: Tensor, a: int, b: int) -> Tensor:
        """Scores of the chunk in place, without those of keys to come."""
        if self.exponents is not None and self.peaks is not None:
            powers = self.exponents[:, a:b].mT - self.peaks[:, a:b]
            scores *= torch.exp2(powers.clamp_max_(0))  # positive for keys to come alone
        return scores.tril_()

    def from_before(self, queries: Tensor, a: int, b: int) -> Tensor:
        """Queries, to meet the state before the chunk."""
        if self.peaks is None:
            return queries
        return queries * torch.exp2(self.peaks[:, a - 1 : a] - self.peaks[:, a:b])

    def into(self, keys: Tensor, a: int, b: int) -> Tensor:
        """Keys, to go into the state after the chunk."""
        if self.exponents is None or self.peaks is None:
            return keys
        return keys * torch.exp2(self.exponents[:, a:b] - self.peaks[:, b - 1 : b])

    def fade(self, state: Tensor, a: int, b: int) -> Tensor:
        """The state before the chunk, in place, on the scale of the one after it."""
        if self.peaks is not None and a:
            state *= torch.exp2(self.peaks[:, a - 1 : a] - self.peaks[:, b - 1 : b])
        return state

    def to_after(self, keys: Tensor, a: int, b: int) -> Tensor:
        """Keys or values, to meet the state of the queries after the chunk."""
        if self.exponents is None or self.peaks is None:
            return keys
        return keys * torch.exp2(self.exponents[:, a:b] - self.peaks[:, b : b + 1])

    def back(self, queries: Tensor, a: int, b: int) -> Tensor:
        """Queries, to go into the state that the chunks before will meet."""
        if self.peaks is None:
            return queries
        return queries * torch.exp2(self.peaks[:, a : a + 1] - self.peaks[:, a:b])

    def fade_back(self, later: Tensor, a: int, b: int) -> Tensor:
        """The state of the queries after the chunk, in place, on the scale of the one before it."""
        if self.peaks is not None and b < self.peaks.shape[-2]:
            later *= torch.exp2(self.peaks[:, a : a + 1] - self.peaks[:, b : b + 1])
        return later


def _relevant(queries: Features, keys: Features, subtractive: bool) -> Tensor | None:
    if subtractive and (keys.exponents is not None or queries.exponents is not None):
        raise ValueError("features with exponents cannot be subtracted from: their scale does not cancel")
    return keys.exponents


def at_one_scale(keys: Features, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """phi(k) / 2**peak, and the peak (..., 1, 1), the largest exponent; None stands for zero."""
    values = keys.values.to(dtype)
    if keys.exponents is None:
        return values, None
    exponents = keys.exponents.to(dtype)
    peak = exponents.amax(-2, keepdim=True)
    return values * torch.exp2(exponents - peak), peak


def _summed(v: Tensor) -> torch.dtype:
    return torch.promote_types(v.dtype, torch.float32)


def with_ones(v: Tensor) -> Tensor:
    """v (..., n, d) with the column of ones that gives the normaliser."""
    return torch.cat((v, torch.ones_like(v[..., :1])), -1)
