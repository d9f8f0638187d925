"""The constants of the construction: their ranges, the conditions of the theorem, the grids they are swept over.

All facts here that are the paper's are recalled, not read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pomona.errors import UsageError

GAP = 0.1
"""How far the threshold lies above the constant column, in units of sqrt(log n)."""

WIDEST = 100_000

SWEPT = ("n", "d", "m", "a0", "a1", "c", "p")
_WHOLE = ("n", "d", "m", "p")
_MOST_VALUES = 200


@dataclass(frozen=True)
class Constants:
    """The constants of data sets and network, within the ranges where the construction exists.

    Attributes:
        n: tokens.
        d: width of a token; n is a multiple of d - 2.
        m: sign vectors.
        a0, a1: amplitudes of the special token in D0 and D1.
        c: share of the constant column.
        variant: self or cross.
        g: row sum of every query in the variant cross, in units of sqrt(log n).

    Raises:
        UsageError: there is no such construction.
    """

    n: int
    d: int
    m: int
    a0: float
    a1: float
    c: float
    variant: str = "self"
    g: float = 2.0

    def __post_init__(self) -> None:
        if not 3 <= self.d <= WIDEST:
            raise UsageError(f"--d is {self.d}; tokens have two columns and at least one between: give 3 to {WIDEST}")
        if not 2 <= self.n <= 10**12:
            raise UsageError(
                f"--n is {self.n}; the threshold tau = (c + {GAP}) sqrt(log n) must be positive: give 2 to 10^12"
            )
        if self.n % (self.d - 2):
            near = " or ".join(str(n) for n in neighbours(self.n, self.d))
            raise UsageError(
                f"n={self.n}, d={self.d}: n must be divisible by d - 2 = {self.d - 2}; try n={near}",
                hint="--fit-n rounds n for you",
            )
        if not 1 <= self.m <= 10**6:
            raise UsageError(f"--m is {self.m}; give the number of sign vectors, from 1 to 10^6")
        for name, value in (("a0", self.a0), ("a1", self.a1)):
            if not 0 <= value <= 1e6:
                raise UsageError(f"--{name} is {value:g}; an amplitude lies from 0 to 10^6")
        if not self.c > -GAP:
            raise UsageError(
                f"--c is {self.c:g}; the threshold tau = (c + {GAP}) sqrt(log n) must be positive: give 0 to 1"
            )
        if not 0 <= self.c <= 1:
            raise UsageError(f"--c is {self.c:g}; b = 1 - c and c are shares, neither below 0: give 0 to 1")
        if not 0 < self.g <= 1e3:
            raise UsageError(f"--g is {self.g:g}; the row sum of the queries lies above 0, up to 1000")

    @property
    def b(self) -> float:
        return round(1 - self.c, 12)

    @property
    def unit(self) -> float:
        """L = sqrt(log n), which all entries are multiples of."""
        return math.sqrt(math.log(self.n))

    @property
    def tau(self) -> float:
        return (self.c + GAP) * self.unit

    def row_sum(self, a: float) -> float:
        """Of the special token's query, in units of L. The others have 1; in the variant cross all have the same."""
        return 1 + a if self.variant == "self" else self.g

    def described(self) -> dict[str, Any]:
        """The constants as a row of results names them."""
        found = {"n": self.n, "d": self.d, "m": self.m, "a0": self.a0, "a1": self.a1, "b": self.b, "c": self.c}
        return found | {"tau": self.tau, "variant": self.variant} | ({"g": self.g} if self.variant == "cross" else {})


def unmet(constants: Constants) -> list[str]:
    """The conditions of the theorem that these constants do not meet; asymptotic ones as if exact."""
    n, d, a0, a1, b, c = constants.n, constants.d, constants.a0, constants.a1, constants.b, constants.c
    conditions = {
        f"a0 = {a0:g} is not between 0 and 0.1": 0 < a0 < 0.1,
        f"a1 = {a1:g} is below 0.7": a1 >= 0.7,
        f"b = 1 - c = {b:g} is below 0.1": b >= 0.1,
        f"c = {c:g} is below 0.1": c >= 0.1,
        f"d = {d} is not between n^0.02 = {n**0.02:.3g} and n^0.99 = {n**0.99:.4g}": n**0.02 < d <= n**0.99,
    }
    return [said for said, met in conditions.items() if not met]


def neighbours(n: int, d: int) -> list[int]:
    """The multiples of d - 2 next to n, below and above, that are long enough for a construction."""
    below = n - n % (d - 2)
    return [near for near in (below, below + d - 2) if near >= 2]


def fitted(n: int, d: int) -> int:
    """The multiple of d - 2 nearest to n, the smaller of two; n itself where no construction is near."""
    return n if d < 3 or n < 2 or n % (d - 2) == 0 else min(neighbours(n, d), key=lambda near: abs(near - n))


def parse(text: str) -> tuple[str, tuple[float, ...]]:
    """A sweep, ``a1=0.3:1.2:0.05``, ``n=100:100000:x10`` or ``n=100,1000``, as a name and its values in order.

    Raises:
        UsageError: it is malformed; the message says what is expected.
    """
    name, equals, grid = text.partition("=")
    if not equals or name not in SWEPT:
        raise UsageError(
            f"--sweep {text}: expected NAME=VALUES with a NAME of {', '.join(SWEPT)}",
            hint="as in --sweep a1=0.3:1.2:0.05 or --sweep n=100,1000",
        )
    values = _spaced(text, grid) if ":" in grid else [_number(text, part) for part in grid.split(",")]
    if name in _WHOLE:
        if any(value != int(value) for value in values):
            raise UsageError(f"--sweep {text}: {name} is a whole number, and not all of these are")
        values = [int(value) for value in values]
    return name, tuple(dict.fromkeys(values))


def _spaced(text: str, grid: str) -> list[float]:
    """START:STOP:STEP or START:STOP:xFACTOR, both ends included where a step falls on them."""
    parts = grid.split(":")
    if len(parts) != 3:
        raise UsageError(f"--sweep {text}: a range is START:STOP:STEP or START:STOP:xFACTOR")
    factor = parts[2].startswith("x")
    start, stop, step = _number(text, parts[0]), _number(text, parts[1]), _number(text, parts[2].removeprefix("x"))
    if stop < start or not (step > 1 and start > 0 if factor else step > 0):
        raise UsageError(f"--sweep {text}: START must not exceed STOP, and the values must grow")
    count = math.log(stop / start) / math.log(step) if factor else (stop - start) / step
    if count >= _MOST_VALUES:
        raise UsageError(f"--sweep {text}: that is more than {_MOST_VALUES} values; take larger steps")
    times = range(math.floor(count + 1e-9) + 1)
    return [float(f"{start * step**i if factor else start + i * step:.12g}") for i in times]


def _number(text: str, part: str) -> float:
    try:
        value = float(part)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"--sweep {text}: {part!r} is not a number")
    return value


def own_grids(base: Constants) -> dict[str, tuple[float, ...]]:
    """What is swept unless told otherwise: grids of our own around `base`; the paper's could not be recovered."""
    widths = [factor + 2 for factor in _divisors(base.n) if factor + 2 <= WIDEST]
    sizes = {fitted(n, base.d) for n in (200, 500, 1000, 2000, 5000, 10_000, 100_000, 1_000_000)}
    grids: dict[str, tuple[float, ...]] = {
        "n": tuple(sorted(n for n in {*sizes, base.n} if n > base.d)),
        "d": tuple(_spread(widths, 9)),
        "m": (1, 2, 4, 8, 16, 32),
        "a0": (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6),
        "a1": (0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 1.0, 1.25, 1.5),
        "c": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        "p": tuple(range(2, 17, 2)),
    }
    return {name: values for name, values in grids.items() if values}


def _divisors(n: int) -> list[int]:
    """The divisors of n from 2, without n: with that, no two ordinary tokens would be alike."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)} - {1, n})


def _spread(values: list[int], count: int) -> list[int]:
    if len(values) <= count:
        return values
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]
