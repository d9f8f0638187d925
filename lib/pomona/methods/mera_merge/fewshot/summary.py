"""What the rows of a study come to: each arm over its draws, and the merged adapter against each other arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

MEASURES = ("accuracy", "nll")


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each arm, in the order of its first row.

    An entry has of every measure the `spread` over draws, and under ``behind`` that of the differences to the merged
    adapter on the same draws (accuracy: merged minus arm; nll: arm minus merged; above 0 merged is better). Where a
    draw failed there are no means, and ``reason`` says why.
    """
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(row)
    merged = {row["draw"]: row for row in by_arm.get("merged", [])}
    entries = []
    for arm, found in by_arm.items():
        entry: dict[str, Any] = {"arm": arm, "draws": len(found)}
        entry |= {name: found[0][name] for name in ("trained_parameters", "added_parameters")}
        failed = [row for row in (*found, *merged.values()) if row["status"] != "done"]
        if failed:
            entry["reason"] = f"{failed[0]['arm']}, draw {failed[0]['draw']}: {failed[0]['reason']}"
        for name in MEASURES:
            values = [row[name] for row in found]
            entry[name] = spread(values) if None not in values else None
        if arm != "merged":
            entry["behind"] = None if failed else {name: spread(_differences(found, merged, name)) for name in MEASURES}
        entries.append(entry)
    return entries


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard deviation (n - 1), and half the width of Student's 95 % interval of the mean.

    The last two are None of a single value.
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "deviation": None, "half_interval": None}
    from scipy.stats import t

    deviation = statistics.stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return {"mean": mean, "deviation": deviation, "half_interval": half}


def _differences(found: Sequence[Mapping[str, Any]], merged: Mapping[int, Mapping[str, Any]], name: str) -> list[float]:
    sign = 1.0 if name == "accuracy" else -1.0
    return [sign * (merged[row["draw"]][name] - row[name]) for row in found]
