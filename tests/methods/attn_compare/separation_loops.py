"""The network of the theorem and its data once more, in loops over tokens and sign vectors, for comparison."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

WEIGHTS: dict[str, Callable[[float], float]] = {
    "exp": math.exp,
    "linear": lambda s: s,
    "uniform": lambda s: 1.0,
    "pow:2": lambda s: s**2,
    "pow:8": lambda s: s**8,
    "taylor2": lambda s: 1 + s + s * s / 2,
    "euler:8": lambda s: (1 + s / 8) ** 8,
}


def data(n: int, d: int, a: float, b: float, c: float, special: int = 0) -> Matrix:
    unit = math.sqrt(math.log(n))
    found = np.zeros((n, d))
    for row in range(n):
        found[row, 0] = a * unit if row == special else 0.0
        found[row, 1 + row % (d - 2)] = b * unit
        found[row, d - 1] = c * unit
    return found


def attended(weight: Callable[[float], float], queries: Matrix, keys: Matrix) -> Matrix:
    """c of every token, (n, d)."""
    x = np.ones((keys.shape[1], keys.shape[1]))
    found = np.zeros_like(keys)
    for i, query in enumerate(queries):
        u = [weight(float(query @ x @ key)) for key in keys]
        alpha = math.fsum(u)
        for share, key in zip(u, keys, strict=True):
            found[i] += share / alpha * key
    return found


def network(outputs: Matrix, signs: Matrix, tau: float) -> tuple[Matrix, float]:
    """<c, y> of every sign vector and token, and F."""
    inner = np.array([[sum(c * y for c, y in zip(row, sign, strict=True)) for row in outputs] for sign in signs])
    total = math.fsum(max(float(value) - tau, 0.0) for value in inner.ravel())
    return inner, max(total, 0.0)
