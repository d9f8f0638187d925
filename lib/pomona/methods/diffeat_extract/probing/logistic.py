"""Multinomial logistic regression on standardised features: the optimum that scikit-learn has, reached sooner."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import OptimizeResult, minimize

from pomona.errors import CheckFailed, DataError

Matrix = NDArray[np.float64]

_TOLERANCE = 1e-7
"""How far above its least the loss may stay, relatively: so near, answers no longer change."""

_CURVATURE = 0.02
"""Of the loss in a logit, p (1 - p), as a guess for all images and labels: any positive one gives the same optimum."""

_ITERATIONS = 10_000


def logistic(train: ArrayLike, train_labels: ArrayLike, test: ArrayLike, *, penalty: float) -> NDArray[np.int64]:
    """The labels that a classifier learned on `train` gives to `test`.

    Features are standardised by mean and deviation of `train`; columns that are constant there are left out. Then, as
    scikit-learn has it, W and b are where this is least::

        sum_i -log softmax(W x_i + b)[y_i]  +  |W|^2 / (2 penalty)

    (the sigmoid in place of the softmax for two labels). All in float64; the same input gives the same answer in one
    thread, which `pomona.runtime.jobs.one_thread` sees to.

    By L-BFGS, in coordinates in which the loss would curve alike on all sides if it did so in all images:
    U = L^T W^T with L L^T = c X^T X + I / penalty. The penalty costs nothing there, as
    |U|^2 = c |X W^T|^2 + |W|^2 / penalty. With fewer images than columns, W is sought among combinations of images,
    where it must lie.

    Args:
        train: (images, columns).
        train_labels: (images,), whole numbers.
        test: (others, columns).
        penalty: inverse strength of the penalty, scikit-learn's C.

    Raises:
        CheckFailed: a feature is not finite, or the loss did not come near its least.
        DataError: there is no image to learn from.
    """
    given, asked = np.array(train, dtype=np.float64), np.asarray(test)
    labels, targets = np.unique(np.asarray(train_labels, dtype=np.int64), return_inverse=True)
    if not len(labels):
        raise DataError("there is no image to learn from")
    for what, features in (("to learn from", given), ("to test on", asked)):
        if not np.isfinite(features).all():
            raise CheckFailed(f"the features {what} are not all finite")
    varied = np.ptp(given, axis=0) > 0
    if not varied.all():
        given, asked = given[:, varied], asked[:, varied]
    mean = given.mean(axis=0)
    given -= mean
    scale = np.sqrt(np.square(given).mean(axis=0))
    given /= scale
    # The sigmoid has one row w where the softmax has two, w / 2 and -w / 2, of half its square: it must weigh double.
    weights, bias = _optimum(given, targets, len(labels), (2 if len(labels) == 2 else 1) / penalty)
    weights /= scale[:, None]
    found: NDArray[np.int64] = labels[(asked.astype(np.float64) @ weights + (bias - mean @ weights)).argmax(axis=1)]
    return found


def _optimum(x: Matrix, targets: NDArray[np.int64], labels: int, strength: float) -> tuple[Matrix, Matrix]:
    """W^T (columns, labels) and b (labels,) of centred images `x` (images, columns); `strength` is 1 / penalty."""
    images, columns = x.shape
    if images >= columns:
        return _descended(x, targets, labels, strength)
    root = _factor(x @ x.T, 0.0)  # its rows are the images in a basis of their span, in which |W| is the same
    weights, bias = _descended(root, targets, labels, strength)
    return x.T @ solve_triangular(root, weights, lower=True, trans=1, check_finite=False), bias


def _descended(x: Matrix, targets: NDArray[np.int64], labels: int, strength: float) -> tuple[Matrix, Matrix]:
    images, columns = x.shape
    factor = _factor(_CURVATURE * (x.T @ x), strength)
    z = solve_triangular(factor, x.T, lower=True, check_finite=False).T
    step = 1 / np.sqrt(_CURVATURE * images)  # for b what L is for W
    own = np.arange(images), targets
    near, gradient, value = False, np.empty(0), 0.0

    def loss(point: Matrix) -> tuple[float, Matrix]:
        nonlocal gradient, value
        u, b = point[: columns * labels].reshape(columns, labels), step * point[columns * labels :]
        plain = z @ u
        logits = plain + b
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[own].sum()
        residual = np.exp(logits, out=logits)
        total = residual.sum(axis=1, keepdims=True)
        residual /= total
        residual[own] -= 1
        slope = step * residual.sum(axis=0)
        curved = _CURVATURE * plain
        value = float(np.log(total).sum() - chosen + (np.vdot(u, u) - np.vdot(curved, plain)) / 2)
        residual -= curved
        gradient = np.concatenate([(z.T @ residual + u).ravel(), slope])
        return value, gradient

    def enough(intermediate_result: OptimizeResult) -> None:
        nonlocal near
        near = bool(gradient @ gradient <= 2 * _TOLERANCE * value)  # of the point reached, the last one tried
        if near:
            raise StopIteration

    found = minimize(
        loss,
        np.zeros((columns + 1) * labels),
        jac=True,
        method="L-BFGS-B",
        callback=enough,
        options={"maxiter": _ITERATIONS, "maxfun": 2 * _ITERATIONS, "gtol": 0, "ftol": 0},
    )
    if not (near or found.success):
        raise CheckFailed(
            f"logistic regression did not converge in {found.nit} iterations", hint="a lower --penalty makes it easier"
        )
    u = found.x[: columns * labels].reshape(columns, labels)
    return solve_triangular(factor, u, lower=True, trans=1, check_finite=False), step * found.x[columns * labels :]


def _factor(squares: Matrix, strength: float) -> Matrix:
    """L, lower triangular, with L L^T = `squares` + `strength` on the diagonal, or the little that L needs to exist."""
    squares[np.diag_indices(len(squares))] += max(strength, 1e-12 * squares.trace() or 1.0)
    return np.asarray(cholesky(squares, lower=True, overwrite_a=True, check_finite=False))
