"""Random sign vectors y in {-1, +1}^d, from a counter-based generator whose key is the content they are drawn for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

_WORDS_AT_ONCE = 1 << 20


class Kinds(NamedTuple):
    """What an output whose entries are of four kinds sees of sign vectors; each (...).

    Attributes:
        first: the sign of the first column.
        own: the sign of the second column, where the special token has its b.
        others: the sum of the signs of the columns between that one and the last.
        last: the sign of the last column.
    """

    first: Floats
    own: Floats
    others: Floats
    last: Floats


@dataclass(frozen=True)
class Signs:
    """Sign vectors, 64 signs to a number.

    Attributes:
        words: (..., w); bit i of word k is sign 64 k + i, set for +1. Bits from d on mean nothing.
        d: signs of a vector.
    """

    words: NDArray[np.uint64]
    d: int

    @cached_property
    def kinds(self) -> Kinds:
        first, own, last = (self._sign(index) for index in (0, 1, self.d - 1))
        spare = 64 * self.words.shape[-1] - self.d
        mask = np.full(self.words.shape[-1], 2**64 - 1, dtype=np.uint64)
        mask[-1] >>= np.uint64(spare)
        total = 2.0 * np.bitwise_count(self.words & mask).sum(-1, dtype=np.int64) - self.d
        return Kinds(first, own, total - first - own - last, last)

    def _sign(self, index: int) -> Floats:
        word, bit = divmod(index, 64)
        return ((self.words[..., word] >> np.uint64(bit)) & np.uint64(1)) * 2.0 - 1

    def each(self) -> Floats:
        """Every sign, (..., d)."""
        bits = np.unpackbits(np.ascontiguousarray(self.words, dtype="<u8").view(np.uint8), axis=-1, bitorder="little")
        return bits[..., : self.d] * 2.0 - 1


def drawn(content: str, trials: int, m: int, d: int) -> Iterator[Signs]:
    """m sign vectors for each trial, in batches (t, m) of as many trials as memory should hold.

    Every trial has counters of its own, in the stream that belongs to `content`: neither how many trials there are nor
    what was drawn before changes it.
    """
    key = int.from_bytes(hashlib.sha256(content.encode()).digest()[:16], "little")
    generator = np.random.Philox(key=key)
    words = -(-d // 64)
    at_once = max(1, _WORDS_AT_ONCE // (m * words))
    for start in range(0, trials, at_once):
        count = min(at_once, trials - start)
        yield Signs(generator.random_raw(count * m * words).reshape(count, m, words), d)
