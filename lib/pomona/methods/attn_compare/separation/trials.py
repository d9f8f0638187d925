"""Simulation of the separation: how often the networks fire, and how well their largest pre-activation ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pomona.methods.attn_compare.separation.constants import Constants
from pomona.methods.attn_compare.separation.construction import Network, fires
from pomona.methods.attn_compare.separation.signs import Floats, drawn
from pomona.report.intervals import wilson


@dataclass(frozen=True)
class Trials:
    """What T trials gave.

    Attributes:
        hits, alarms: (T,) sign vectors, out of m, that fire on D1 and on D0.
        m: sign vectors of a trial.
        first: (T,) the largest pre-activation on D1.
        zeroth: (T,) the same on D0, under sign vectors of its own.
    """

    hits: Floats
    alarms: Floats
    m: int
    first: Floats
    zeroth: Floats

    def measured(self) -> tuple[dict[str, float | None], dict[str, list[float]]]:
        """Values and their 95 % intervals."""
        trials = len(self.hits)
        fired, silent = self.hits > 0, self.alarms == 0
        counted = {
            "success": (int((fired & silent).sum()), trials),
            "d1_fires": (int(fired.sum()), trials),
            "d0_silent": (int(silent.sum()), trials),
            "hit_rate": (int(self.hits.sum()), trials * self.m),
            "alarm_rate": (int(self.alarms.sum()), trials * self.m),
            # No wider than of T pairs that share nothing, of which the AUC is the share in the right order.
            "auc": (auc(self.first, self.zeroth) * trials, trials),
        }
        if held_out := best_cut(self.first, self.zeroth):
            counted["best_threshold_accuracy"] = held_out
        values: dict[str, float | None] = {name: k / n for name, (k, n) in counted.items()}
        values.setdefault("best_threshold_accuracy", None)
        return values, {name: list(wilson(k, n)) for name, (k, n) in counted.items()}


def simulate(constants: Constants, zeroth: Network, first: Network, trials: int, seed: int) -> Trials:
    """T trials: m sign vectors that both data sets share, and m more for D0, which only the ranking uses.

    The vectors belong to the constants, so that all kernels are tried on the same.
    """
    content = f"separation/{seed}/{constants}"
    pairs = zip(
        *(drawn(f"{content}/{name}", trials, constants.m, constants.d) for name in ("shared", "fresh")), strict=True
    )
    columns = []
    for shared, fresh in pairs:
        of_first, of_zeroth = first.largest(shared), zeroth.largest(shared)
        hits, alarms = (fires(of, constants).sum(-1) for of in (of_first, of_zeroth))
        columns.append((hits, alarms, of_first.max(-1), zeroth.largest(fresh).max(-1)))
    hits, alarms, of_first, of_zeroth = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Trials(hits, alarms, constants.m, of_first, of_zeroth)


def auc(positive: Floats, negative: Floats) -> float:
    """The share of pairs in which the positive one is larger, ties counting half (Mann and Whitney 1947)."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.sum() / (2 * len(positive) * len(negative)))


def best_cut(positive: Floats, negative: Floats) -> tuple[int, int] | None:
    """Right answers, and out of how many, of the cut that is best on the first half of either, on the second half.

    None of fewer than two trials.
    """
    half = len(positive) // 2
    if not half:
        return None
    ordered0, ordered1 = np.sort(negative[:half]), np.sort(positive[:half])
    cuts = np.concatenate(([-math.inf], ordered0, ordered1))
    right = np.searchsorted(ordered0, cuts, "right") - np.searchsorted(ordered1, cuts, "right")
    cut = cuts[right.argmax()]
    return int((positive[half:] > cut).sum() + (negative[half:] <= cut).sum()), 2 * (len(positive) - half)
