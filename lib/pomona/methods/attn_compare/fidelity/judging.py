"""Every measure of one kernel at the heads of one layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pomona.methods.attn_compare.fidelity import measures
from pomona.methods.attn_compare.fidelity.capture import Heads
from pomona.methods.attn_compare.kernels import Kernel, inner_products, normalised, weights
from pomona.methods.attn_compare.maps import FeatureMap, Features

QUERIES = 64
"""Order, injectivity and doubling are judged at so many queries, evenly spaced."""

Maps = tuple[FeatureMap, FeatureMap]

_UNDEFINED = {
    "entropy": "weights that can be negative have no entropy",
    "spearman": "weights that are all alike have no order",
    "doubling": "queries without weight have no row",
    "nearest_rows": "fewer than two distinct queries",
    "state_bytes": "no finite map is exact",
}


@dataclass(frozen=True)
class Truth:
    """What softmax does at some heads: all that comparing several kernels with it shares.

    Attributes:
        p: (heads, n, n) softmax's matrix.
        judged: the rows that count: in causal attention the first query has no choice.
        some: numbers of the queries that stand for all.
        order: `ranks` of the scores of those queries.
    """

    heads: Heads
    visible: Tensor
    p: Tensor
    judged: slice
    some: Tensor
    order: Tensor

    @classmethod
    def of(cls, heads: Heads, *, full: bool = False) -> Truth:
        visible, scores = heads.sees(full=full), heads.scores()
        n = len(visible)
        first = 0 if full else 1
        count = min(QUERIES, n - first)
        some = torch.linspace(first, n - 1, count, dtype=torch.float64, device=visible.device).round().long()
        p = scores.masked_fill(~visible, -math.inf).softmax(-1)
        order = measures.ranks(scores[:, some], visible[some])
        return cls(heads, visible, p, slice(first, None), some, order)

    def values(self) -> dict[str, Tensor]:
        """What is told of softmax beside every kernel, each (heads,)."""
        return {f"softmax_{name}": value for name, value in _shape(self.p, self.judged).items()}


class Attending:
    """One kernel at the heads of one layer: its rows for any queries."""

    def __init__(self, kernel: Kernel, heads: Heads, maps: Maps | None) -> None:
        self.kernel, self.heads, self.maps = kernel, heads, maps
        self.keys: Features | None = None
        if kernel.weight is None:
            assert maps is not None
            self.keys = maps[1](heads.k)

    def raw(self, queries: Tensor, visible: Tensor | None, some: Tensor | None = None) -> Tensor:
        """Weights up to a factor for each row, of all `queries` or `some` of them."""
        if self.keys is None or self.maps is None:
            chosen = queries if some is None else queries[:, some]
            return weights(self.kernel, chosen, self.heads.k, self.heads.scale, visible=visible)
        values, exponents = self.maps[0](queries)
        if some is not None:  # a feature may depend on the position, so all are made first
            values = values[:, some]
            exponents = None if exponents is None else exponents[:, some]
        return inner_products(Features(values, exponents), self.keys, visible)

    def rows(self, queries: Tensor, some: Tensor) -> Tensor:
        """Attention over all keys, later ones too, of `some` of the `queries`."""
        return normalised(self.kernel, self.raw(queries, None, some))


def judge(kernel: Kernel, truth: Truth, maps: Maps | None) -> list[dict[str, Any]]:
    """A kernel's values for each head, with a status, and a reason where something could not be found.

    Args:
        maps: phi of queries and of keys, for kernels without weights as a function of scores.
    """
    heads, visible = truth.heads, truth.visible
    attending = Attending(kernel, heads, maps)
    raw = attending.raw(heads.q, visible)
    q = normalised(kernel, raw, visible=visible)
    found = _compared(truth, q, kernel) | truth.values() | _structure(truth, q, attending)
    if not kernel.subtractive:
        found["near_zero"] = measures.near_zero(raw)[:, truth.judged].double().mean(-1)
    if kernel.name.startswith("favor:") and maps is not None:
        found |= _samples(truth, attending, maps)
    finite = q.isfinite().flatten(1).all(-1)
    columns = {name: value.tolist() for name, value in found.items()}
    return [
        _row(kernel, {name: column[head] for name, column in columns.items()}, heads, bool(finite[head]))
        for head in range(len(q))
    ]


def divergence(kernel: Kernel, truth: Truth, maps: Maps) -> list[float]:
    """Mean KL of each head alone, for maps before they learn and for the text they learn from."""
    q = normalised(
        kernel, Attending(kernel, truth.heads, maps).raw(truth.heads.q, truth.visible), visible=truth.visible
    )
    found: list[float] = measures.divergence(truth.p, q)[0][:, truth.judged].mean(-1).tolist()
    return found


def _compared(truth: Truth, q: Tensor, kernel: Kernel) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    first, v = truth.judged.start, truth.heads.v
    # The second time without key 0, on which softmax lays what it does not need, and without the row that saw no other.
    for suffix, p, a, values, judged in (
        ("", truth.p, q, v, truth.judged),
        (
            "_rest",
            measures.without_first(truth.p),
            measures.without_first(q),
            v[:, 1:],
            slice(first + 1 if first else 0, None),
        ),
    ):
        kl, touched = measures.divergence(p, a)
        found[f"kl{suffix}"] = kl[:, judged].mean(-1)
        found[f"error{suffix}"] = measures.output_error(p, a, values)
        found[f"top1{suffix}"] = measures.agreement(p, a)[:, judged].double().mean(-1)
        if not suffix:
            found["floored"] = touched[:, judged].double().mean(-1)
            found |= _shape(a, judged, signed=not kernel.positive)
    return found


def _shape(p: Tensor, judged: slice, *, signed: bool = False) -> dict[str, Tensor]:
    mean = {
        "max_weight": p.amax(-1)[:, judged].mean(-1),
        "sink": p[:, judged, 0].mean(-1),
        "entropy": measures.entropy(p)[:, judged].mean(-1),
    }
    if signed:
        mean["entropy"] = torch.full_like(mean["entropy"], math.nan)
    return mean


def _structure(truth: Truth, q: Tensor, attending: Attending) -> dict[str, Tensor]:
    heads, some = truth.heads, truth.some
    seen = truth.visible[some]
    order = measures.ranks(q[:, some], seen)
    rows, doubled = attending.rows(heads.q, some), attending.rows(2 * heads.q, some)
    weighty = (rows.abs().sum(-1) > 0) & (doubled.abs().sum(-1) > 0)
    moved = (rows - doubled).abs().amax(-1).masked_fill(~weighty, -1).amax(-1)
    return {
        "spearman": measures.spearman(truth.order, order, seen).nanmean(-1),
        "discordant": measures.discordance(truth.order, order, seen).mean(-1),
        "nearest_rows": measures.nearest_rows(rows, heads.q[:, some]),
        "doubling": torch.where(moved < 0, math.nan, moved),
    }


def _samples(truth: Truth, attending: Attending, maps: Maps) -> dict[str, Tensor]:
    """For random features: how many carry an estimate, and how far it is from exp s, where softmax puts its weight."""
    heads, keys = truth.heads, attending.keys
    queries = maps[0](heads.q)
    assert keys is not None and keys.exponents is not None and queries.exponents is not None
    carried = measures.effective_samples(queries.values, keys.values)
    scores = heads.q @ heads.k.mT * heads.scale
    powers = (queries.exponents + keys.exponents.mT) * math.log(2)
    ratio = ((queries.values @ keys.values.mT).log() + powers - scores).exp()
    wrong = torch.where(truth.p > 0, truth.p * (ratio - 1).square(), 0)
    return {
        "effective_samples": (truth.p * carried).sum(-1)[:, truth.judged].mean(-1),
        "estimate_error": wrong.sum(-1)[:, truth.judged].mean(-1).sqrt(),
    }


def _row(kernel: Kernel, values: Mapping[str, float], heads: Heads, finite: bool) -> dict[str, Any]:
    if not finite:
        sound = all(bool(x.isfinite().all()) for x in (heads.q, heads.k))
        reason = "its weights overflow float64" if sound else "queries or keys of the layer are not finite"
        return {"status": "failed", "reason": reason, "values": {}}
    width, wide = heads.q.shape[-1], heads.v.shape[-1]
    features = kernel.features(width)
    held: dict[str, float | int | None] = {
        name: value if math.isfinite(value) else None for name, value in values.items()
    }
    held["state_bytes"] = None if features is None else measures.state_bytes(features, wide)
    held["break_even"] = None if features is None else measures.break_even(features, width, wide)
    reasons = [_UNDEFINED.get(name, f"{name} is not finite") for name, value in held.items() if value is None]
    found: dict[str, Any] = {"status": "done", "values": held}
    if features is None:
        reasons.remove("break_even is not finite")
    if reasons:
        found["reason"] = "; ".join(reasons)
    return found
