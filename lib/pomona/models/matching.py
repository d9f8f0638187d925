"""Which hidden unit of one layer is which of another: distances between units, and the cheapest one-to-one matching."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pomona.errors import CheckFailed

Metric = Literal["euclidean", "cosine"]

_CANCELLED = 1e-6  # a squared distance below this share of the squared norms has lost its digits
_PAIRS = 1 << 22  # numbers of the differences taken at once


def distances(reference: Tensor, other: Tensor, metric: Metric = "euclidean") -> Tensor:
    """Distances between the units of two layers, each described by the same features.

    Args:
        reference: (r, f).
        other: (s, f).
        metric: "euclidean", or "cosine", 1 - cos; a unit of zeros is at 0 from others of zeros and at 1 from the rest.

    Returns:
        (r, s), float64, exactly 0 between equal rows.

    Raises:
        CheckFailed: a distance is not finite.
    """
    left, right = reference.detach().double(), other.detach().double()
    if metric == "euclidean":
        found = _squared(left, right).sqrt()
    else:
        left, right = (functional.normalize(rows, eps=torch.finfo(rows.dtype).tiny) for rows in (left, right))
        found = _squared(left, right) / 2  # keeps the digits that 1 - cos loses near 0
        empty = left.any(1).logical_not()[:, None] ^ right.any(1).logical_not()[None]
        found.masked_fill_(empty, 1.0)
    if not bool(found.isfinite().all()):
        raise CheckFailed(
            "the distances between units are not finite", hint="are there infinite or enormous weights or activations?"
        )
    return found


def assignment(cost: Tensor) -> Tensor:
    """The permutation p, (r,) int64, that matches unit i of the reference to unit p[i] at the least total cost.

    Where the identity costs no more, it is the identity: what gains nothing moves nothing.

    Args:
        cost: (r, r), finite.
    """
    from scipy.optimize import linear_sum_assignment

    cost = cost.double().cpu()
    _, columns = linear_sum_assignment(cost.numpy())
    permutation = torch.from_numpy(columns).long()
    least = float(cost.gather(1, permutation[:, None]).sum())
    idle = float(cost.diagonal().sum()) <= least * (1 + 1e-12)  # up to rounding
    return torch.arange(len(permutation)) if idle else permutation


def _squared(left: Tensor, right: Tensor) -> Tensor:
    """Squared euclidean distances by one product of matrices; those that cancel are taken from the differences."""
    norms = left.square().sum(1)[:, None] + right.square().sum(1)[None]
    found = (norms - 2 * left @ right.T).clamp_(min=0)
    close = (found < _CANCELLED * norms).nonzero()
    for pairs in torch.split(close, max(1, _PAIRS // max(1, left.shape[1]))):
        rows, columns = pairs.unbind(1)
        found[rows, columns] = (left[rows] - right[columns]).square().sum(1)
    return found
