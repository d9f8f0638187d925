"""Linear CKA: how alike two sets of features of the same images are, in whatever bases (Kornblith et al. 2019).

With linear kernels K = X X^T and L = Y Y^T of features whose columns have mean 0, equations 3 and 4 of the paper are::

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),     HSIC(K, L) = <K, L> / (n - 1)^2 = |X^T Y|^2 / (n - 1)^2

which is 1 where X and Y differ by a rotation and a scale. The more columns for each image, the closer to 1 it is of
features that have nothing in common, so that wide blocks would look alike and narrow ones would not. The default here
is therefore the unbiased HSIC of Song et al. (2012), in which no image is compared with itself. With k and l the
diagonals of K and L::

    n (n - 3) HSIC(K, L) = <K, L> - n / (n - 2) <k, l> + sum(k) sum(l) / ((n - 1) (n - 2))

Its CKA of unrelated features is 0 in the mean, and may fall a little below. As it is unbiased for any number of images,
many images can be compared in windows whose HSIC are averaged (Nguyen et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pomona.errors import CheckFailed, DataError

Matrix = NDArray[np.float64]

WINDOW = 256
"""Images that are compared with one another; fewer than twice as many are compared all at once."""

LEAST = 4
"""Images that the unbiased HSIC needs."""

_NOTHING = 1e-12  # of <K, K>: an HSIC(K, K) below it is rounding


def linear_cka(first: ArrayLike, second: ArrayLike, *, debiased: bool = True) -> float | None:
    """CKA of `first` (n, d1) and `second` (n, d2), in float64.

    Args:
        debiased: take the unbiased HSIC; otherwise that of the paper.

    Returns:
        None where one of the two does not tell images apart.

    Raises:
        CheckFailed: a feature is not finite.
        DataError: there are fewer than 4 images, or 2 for the paper's HSIC.
        ValueError: there are not as many images in both.
    """
    x, y = _centred(first, "the first features"), _centred(second, "the second features")
    if len(x) != len(y):
        raise ValueError(f"features of {len(x)} and of {len(y)} images")
    _enough(len(x), LEAST if debiased else 2)
    pairs = [[_inner(x, x), _inner(x, y)], [_inner(x, y), _inner(y, y)]]
    products = np.array(pairs)
    diagonals = np.stack([np.square(features).sum(axis=1) for features in (x, y)])
    return _ratios(_unbiased(products, diagonals) if debiased else products, products.diagonal())[0][1]


class Accumulated:
    """Debiased linear CKA of every pair among several sets of features, given in batches.

    How the images are batched changes nothing; their order does, where there are more than `WINDOW` of them twice.
    Memory is bounded: the features of fewer than twice `WINDOW` images, or of a batch where that is more, and half a
    kernel of as many for each set.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.images = 0
        self._pending: dict[str, list[NDArray[np.generic]]] = {name: [] for name in self.names}
        self._waiting = 0
        self._sums = np.zeros((len(self.names), len(self.names)))
        self._raw = np.zeros(len(self.names))

    def add(self, features: Mapping[str, ArrayLike]) -> None:
        """The features (images, columns) that every set has of the next images.

        Raises:
            CheckFailed: a feature is not finite.
            ValueError: sets of unlike numbers of images.
        """
        batch = {name: np.asarray(features[name]) for name in self.names}
        counts = {len(rows) for rows in batch.values()}
        if len(counts) > 1:
            raise ValueError(f"sets of {sorted(counts)} images")
        count = counts.pop() if counts else 0
        self.images += count
        self._waiting += count
        for name, rows in batch.items():
            self._pending[name].append(rows)
        while self._waiting >= 2 * WINDOW:
            waiting = self._joined()
            sums, raw = self._compared({name: rows[:WINDOW] for name, rows in waiting.items()})
            self._sums += sums
            self._raw += raw
            self._pending = {name: [rows[WINDOW:]] for name, rows in waiting.items()}
            self._waiting -= WINDOW

    def matrix(self) -> list[list[float | None]]:
        """CKA of all pairs, in the order of the names; None where one of the two does not tell images apart.

        Raises:
            CheckFailed: a feature is not finite.
            DataError: there are fewer than 4 images.
        """
        _enough(self.images, LEAST)
        sums, raw = self._compared(self._joined())
        return _ratios(self._sums + sums, self._raw + raw)

    def _joined(self) -> dict[str, NDArray[np.generic]]:
        return {name: parts[0] if len(parts) == 1 else np.concatenate(parts) for name, parts in self._pending.items()}

    def _compared(self, features: Mapping[str, NDArray[np.generic]]) -> tuple[Matrix, Matrix]:
        """n HSIC of all pairs, and what of HSIC(K, K) is <K, K>."""
        images = len(next(iter(features.values())))
        upper = np.triu_indices(images)
        halves = np.empty((len(self.names), len(upper[0])))
        diagonals = np.empty((len(self.names), images))
        for place, name in enumerate(self.names):
            x = _centred(features[name], name)
            kernel = x @ x.T
            diagonals[place] = kernel.diagonal()
            kernel *= math.sqrt(2)  # what lies above the diagonal stands for what is below as well
            np.fill_diagonal(kernel, diagonals[place])
            halves[place] = kernel[upper]
        products = halves @ halves.T
        return _unbiased(products, diagonals) / (images - 3), products.diagonal() / (images - 3)


def _centred(features: ArrayLike, name: str) -> Matrix:
    """`features` less the mean of each column; exactly 0 where a column is constant."""
    found = np.array(features, dtype=np.float64)
    if not np.isfinite(found).all():
        raise CheckFailed(f"{name}: not all features are finite")
    if len(found):
        found -= found[0].copy()
        found -= found.mean(axis=0)
    return found


def _inner(x: Matrix, y: Matrix) -> float:
    """<X X^T, Y Y^T>, by the smaller of the matrices that it can be had from."""
    if x.shape[1] * y.shape[1] <= len(x) ** 2:
        return float(np.square(x.T @ y).sum())
    return float(np.vdot(x @ x.T, y @ y.T))


def _unbiased(products: Matrix, diagonals: Matrix) -> Matrix:
    """n (n - 3) HSIC of all pairs, of <K, L> (sets, sets) and the kernels' diagonals (sets, n)."""
    images, sums = diagonals.shape[1], diagonals.sum(axis=1)
    shared = diagonals @ diagonals.T
    found: Matrix = products - images / (images - 2) * shared + np.outer(sums, sums) / ((images - 1) * (images - 2))
    return found


def _ratios(hsic: Matrix, raw: Matrix) -> list[list[float | None]]:
    """CKA of all pairs; `raw` says how small an HSIC(K, K) is none."""
    own = hsic.diagonal()
    telling = own > _NOTHING * raw
    found: list[list[float | None]] = []
    for row, values in enumerate(hsic):
        found.append([])
        for column, value in enumerate(values):
            told = telling[row] and telling[column]
            found[-1].append(min(1.0, float(value / math.sqrt(own[row] * own[column]))) if told else None)
    return found


def _enough(images: int, least: int) -> None:
    if images < least:
        raise DataError(f"{images} images are too few for CKA, which needs {least}")
