"""The data sets and the network of the theorem, token by token and by distinct rows.

    S     = A1 X A2^T, X = 1_d 1_d^T        scores; of rank one, the products of row sums
    f     = u / <u, 1_n>, u = kernel(S)     attention; a row sums to one
    c     = f A3                            its output
    F     = phi(sum over tokens and over y of phi_tau(<c, y>)),  phi_tau(z) = max(z - tau, 0)

Attention sees a token through its row sum alone, and only the special token's differs from the others': two distinct
queries and two distinct keys, with multiplicities, stand for all n.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.methods.attn_compare.kernels import Kernel, attention
from pomona.methods.attn_compare.maps import FeatureMap
from pomona.methods.attn_compare.separation.constants import Constants
from pomona.methods.attn_compare.separation.signs import Floats, Kinds, Signs

Maps = tuple[FeatureMap, FeatureMap]

SPECIAL = 0
"""The row j3 of the special token; only kernels that know positions could tell."""

_ROUNDING = 1e-12


def feature_maps(kernel: Kernel, n: int, seed: int) -> Maps | None:
    """phi of the row sums whose products scores are, learned maps as they begin; None where scores are enough."""
    if kernel.weight is not None:
        return None
    queries, keys = kernel.build(1, 1.0, length=n, seed=seed)
    return queries.requires_grad_(False), keys.requires_grad_(False)


def dataset(constants: Constants, a: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A1 and A2 = A3, each (n, d), with the special token at amplitude `a`.

    In the variant self all three are one matrix. In the variant cross, a declared reading, keys and values are that
    matrix, and every query is g sqrt(log n) in the last column.
    """
    n, d, unit = constants.n, constants.d, constants.unit
    keys = torch.zeros((n, d), dtype=dtype)
    keys[SPECIAL, 0] = a * unit
    keys[:, 1:-1] = constants.b * unit * torch.eye(d - 2, dtype=dtype).repeat(n // (d - 2), 1)
    keys[:, -1] = constants.c * unit
    if constants.variant == "self":
        return keys, keys
    queries = torch.zeros((n, d), dtype=dtype)
    queries[:, -1] = constants.g * unit
    return queries, keys


def dense_outputs(kernel: Kernel, data: tuple[Tensor, Tensor], maps: Maps | None) -> Tensor:
    """c of every token, (n, d), by the whole attention matrix."""
    queries, keys = data
    ones = torch.ones((keys.shape[-1], 1), dtype=keys.dtype)
    rows = attention(kernel, queries @ ones, keys @ ones, 1.0, maps=maps)
    return rows.reshape(len(queries), len(keys)) @ keys


@dataclass(frozen=True)
class Outputs:
    """c of the distinct queries, the special token's first.

    Attributes:
        rows: (q, 4), the entries of c in four kinds of columns: the first; the second, where the special token has its
            b; each of the d - 3 between that and the last; the last.
        counts: (q,) how many tokens each query stands for.
    """

    rows: Floats
    counts: Floats

    def pre_activations(self, signs: Signs) -> Floats:
        """<c, y> of every sign vector and query, (..., q)."""
        return self.of_kinds(signs.kinds)

    def of_kinds(self, kinds: Kinds) -> Floats:
        """The same for signs of which only the four kinds are known."""
        first, own, others, last = (sign[..., None] * entry for sign, entry in zip(kinds, self.rows.T, strict=True))
        found: Floats = first + own + others + last  # no matrix product: equal signs must give equal bits anywhere
        return found

    def largest(self, signs: Signs) -> Floats:
        """The largest <c, y> of any token, (...)."""
        found: Floats = self.pre_activations(signs).max(-1)
        return found


@dataclass(frozen=True)
class EveryRow:
    """c of all tokens, (n, d), for kernels to which no two tokens are alike."""

    rows: Floats

    @property
    def counts(self) -> Floats:
        return np.ones(len(self.rows))

    def pre_activations(self, signs: Signs) -> Floats:
        """<c, y> of every sign vector and token, (..., n)."""
        found: Floats = (torch.from_numpy(signs.each()) @ torch.from_numpy(self.rows).T).numpy()
        return found

    def largest(self, signs: Signs) -> Floats:
        """The largest <c, y> of any token for sign vectors (t, m), trial by trial."""
        return np.stack([self.pre_activations(Signs(words, signs.d)).max(-1) for words in signs.words])


Network = Outputs | EveryRow


def shares(
    kernel: Kernel, constants: Constants, a: float, maps: Maps | None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Attention of the distinct queries to the special token and to all others together, (q, 2).

    The first query is the special token's; in the variant cross there is only one.
    """
    unit = constants.unit
    sums = (constants.row_sum(a), 1.0) if constants.variant == "self" else (constants.g,)
    queries = torch.tensor([[s * unit] for s in sums], dtype=dtype)
    keys = torch.tensor([[(1 + a) * unit], [unit]], dtype=dtype)
    counts = torch.tensor([1, constants.n - 1], dtype=dtype)
    return attention(kernel, queries, keys, 1.0, counts=counts, maps=maps).reshape(len(sums), 2)


def outputs(
    kernel: Kernel, constants: Constants, a: float, maps: Maps | None, dtype: torch.dtype = torch.float64
) -> Network:
    """c of the data set whose special token has amplitude `a`, on the shortest way that is exact for the kernel."""
    if kernel.positional:
        return EveryRow(dense_outputs(kernel, dataset(constants, a, dtype), maps).numpy())
    special, ordinary = shares(kernel, constants, a, maps, dtype).T
    unit, b = constants.unit, constants.b
    copies = constants.n // (constants.d - 2)
    each = ordinary / (constants.n - 1)
    rows = torch.stack(
        (
            special * (a * unit),
            special * (b * unit) + each * ((copies - 1) * b * unit),
            each * (copies * b * unit),
            (special + ordinary) * (constants.c * unit),
        ),
        -1,
    )
    counts = [1, constants.n - 1] if constants.variant == "self" else [constants.n]
    return Outputs(rows.numpy(), np.array(counts, dtype=np.float64))


def fires(pre_activations: Floats, constants: Constants) -> NDArray[np.bool_]:
    """Whether <c, y> exceeds tau. Exact ties do occur, and do not fire: what is within rounding of tau is one."""
    return pre_activations > constants.tau + _ROUNDING * constants.unit


def final(found: Floats, counts: Floats, tau: float) -> float:
    """F, of pre-activations (m, q) and the number of tokens with each query (q,)."""
    return float(max((np.maximum(found - tau, 0) * counts).sum(), 0))


def dense_difference(
    kernel: Kernel, constants: Constants, a: float, maps: Maps | None, signs: Signs, dtype: torch.dtype = torch.float64
) -> float:
    """The largest difference between the two ways: of any token's <c, y>, y from `signs` (m,), and of F.

    F adds up to n m terms; where it exceeds 1 its difference is relative.
    """
    quick = outputs(kernel, constants, a, maps, dtype)
    each = torch.from_numpy(signs.each()).to(dtype)
    slow = (each @ dense_outputs(kernel, dataset(constants, a, dtype), maps).T).numpy()
    found = quick.pre_activations(signs)
    kinds = np.minimum(np.arange(constants.n), len(quick.counts) - 1)  # the special token is the first
    of_tokens = np.abs(slow - found[:, kinds]).max()
    by_token, by_kind = final(slow, np.ones(constants.n), constants.tau), final(found, quick.counts, constants.tau)
    return float(max(of_tokens, abs(by_token - by_kind) / max(1.0, by_token)))
