"""How one attention matrix differs from another, head by head.

P is softmax's matrix, Q a kernel's: (heads, n, n), rows that sum to one, zero where a key is not visible. Q may hold
negative weights, and rows of zeros where a kernel gave no weight at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-12
NEAR_ZERO = 1e-3


def divergence(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(P || Q) of each row in nats, (heads, n), and whether the floor raised a weight of it.

    The divergence is infinite where Q denies a key that P has. So a weight of Q below 1e-12 counts as 1e-12, or as P's
    own weight where that is smaller still, and the row is made to sum to one again. A row of zeros thereby counts as
    uniform, and Q = P is left untouched.
    """
    least = p.clamp_max(FLOOR)
    raised = q.maximum(least)
    touched = ((q < least) & (q < p * (1 - 1e-9))).any(-1)
    total = raised.sum(-1)
    difference = torch.where(p > 0, p * (p / raised).log(), 0).sum(-1) + total.log() * p.sum(-1)
    return difference.clamp_min(0), touched


def output_error(p: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """||(P - Q) V|| / ||P V||, Frobenius norms over all rows, (heads,)."""
    found: Tensor = torch.linalg.matrix_norm((p - q) @ v) / torch.linalg.matrix_norm(p @ v)
    return found


def entropy(p: Tensor) -> Tensor:
    """Entropy of each row in nats, (heads, n); of rows without negative weights."""
    found: Tensor = torch.special.entr(p).sum(-1)
    return found


def agreement(p: Tensor, q: Tensor) -> Tensor:
    """Whether P and Q have their largest weight on the same key, (heads, n); a tie for it is a miss."""
    (first, place), (second, other) = p.max(-1), q.max(-1)
    alone = ((p == first[..., None]).sum(-1) == 1) & ((q == second[..., None]).sum(-1) == 1)
    return (place == other) & alone


def without_first(p: Tensor) -> Tensor:
    """P over the keys after the first, (heads, n, n - 1), rows made to sum to one again or left zero."""
    rest = p[..., 1:]
    total = rest.sum(-1, keepdim=True)
    return torch.where(total == 0, 0, rest / total)


def ranks(x: Tensor, visible: Tensor) -> Tensor:
    """Rank of each visible entry in its row, from 0, ties sharing their mean rank; the invisible come last.

    Args:
        x: (..., rows, n).
        visible: (rows, n).
    """
    ordered, order = x.masked_fill(~visible, torch.inf).sort(-1)
    count = x.shape[-1]
    place = torch.arange(count, device=x.device).expand(x.shape)
    opens = torch.ones_like(order, dtype=torch.bool)
    opens[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    closes = torch.ones_like(opens)
    closes[..., :-1] = opens[..., 1:]
    first = place.masked_fill(~opens, 0).cummax(-1).values
    last = place.masked_fill(~closes, count).flip(-1).cummin(-1).values.flip(-1)
    return torch.empty_like(x).scatter_(-1, order, (first + last).to(x.dtype) / 2)


def spearman(first: Tensor, second: Tensor, visible: Tensor) -> Tensor:
    """Correlation of two `ranks` (..., rows, n) over the visible keys of each row; NaN where one is constant."""
    count = visible.sum(-1, keepdim=True)
    one, two = (
        torch.where(visible, rank - torch.where(visible, rank, 0).sum(-1, keepdim=True) / count, 0)
        for rank in (first, second)
    )
    product = one.square().sum(-1) * two.square().sum(-1)
    return torch.where(product > 0, (one * two).sum(-1) / product.sqrt(), torch.nan)


def discordance(first: Tensor, second: Tensor, visible: Tensor) -> Tensor:
    """Share of the pairs of visible keys that two `ranks` (..., rows, n) put in opposite orders, (..., rows)."""
    count, size = visible.sum(-1), first.shape[-1]
    # In order of the first rank, and of the second where that ties, a discordant pair is one whose second rank falls.
    # The invisible come last in both. Twice a mean rank is whole; small integers compare faster than floats.
    one, two = (2 * first).long(), (2 * second).long()
    order = (one * (2 * size) + two).argsort(-1)
    two = two.gather(-1, order).to(torch.int16 if size < 2**14 else torch.int32)
    found = torch.zeros(two.shape[:-1], dtype=torch.long, device=two.device)
    for i in range(size - 1):
        found += (two[..., i : i + 1] > two[..., i + 1 :]).sum(-1)
    return found / (count * (count - 1) / 2)


def nearest_rows(rows: Tensor, queries: Tensor) -> Tensor:
    """The least distance between the rows (heads, m, n) of two distinct `queries` (heads, m, d), (heads,)."""
    mode = "donot_use_mm_for_euclid_dist"  # by matrix product, equal rows would not have distance 0
    apart = torch.cdist(rows, rows, compute_mode=mode)
    alike = torch.cdist(queries, queries, compute_mode=mode) == 0
    return apart.masked_fill(alike, torch.inf).amin((-2, -1))


def near_zero(raw: Tensor) -> Tensor:
    """Whether the sum of a row's weights is below a thousandth of the sum of their sizes, or zero, (heads, n)."""
    return raw.sum(-1).abs() <= NEAR_ZERO * raw.abs().sum(-1)


def effective_samples(queries: Tensor, keys: Tensor) -> Tensor:
    """How many of m random features carry each estimate of exp s, (sum z)**2 / sum z**2 with z = phi(q) phi(k).

    Args:
        queries: (heads, n, m) positive features, up to a factor for each position.
        keys: alike.

    Returns:
        (heads, n, n), from 1, where one feature decides alone, to m.
    """
    total, squares = queries @ keys.mT, queries.square() @ keys.square().mT
    return torch.where(squares > 0, total.square() / squares, 1)


def state_bytes(features: int, value_width: int, item: int = 4) -> int:
    """Size of what a head carries from token to token: r (e + 1) numbers, the normaliser's column among them."""
    return features * (value_width + 1) * item


def break_even(features: int, width: int, value_width: int) -> float:
    """The length from which that state is smaller than a cache of keys and values, r (e + 1) / (d + e)."""
    return features * (value_width + 1) / (width + value_width)
