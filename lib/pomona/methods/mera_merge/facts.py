"""What is known of a merge: everything report.json holds, in plain numbers and words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pomona.io.manifest import plain
from pomona.io.writers import brief
from pomona.methods.mera_merge import costs, quality
from pomona.methods.mera_merge.adapters import Adapter
from pomona.methods.mera_merge.alignment import Matching
from pomona.methods.mera_merge.config import Config
from pomona.methods.mera_merge.merging import Merged
from pomona.runtime.progress import Progress


@dataclass(frozen=True)
class Ingredients:
    """What is merged, and how.

    Attributes:
        weights: of the adapters, as they are applied.
        said: how the adapters were chosen.
    """

    adapters: Sequence[Adapter]
    method: str
    weights: Sequence[float]
    said: str

    @property
    def labels(self) -> list[str]:
        return [adapter.label for adapter in self.adapters]

    @property
    def copied(self) -> bool:
        """Whether there is nothing to merge: one adapter of weight 1."""
        return len(self.adapters) == 1 and self.weights[0] == 1


def facts(
    config: Config,
    made_of: Ingredients,
    merged: Merged,
    written: Adapter,
    reference: str,
    base: quality.Base | None,
    progress: Progress,
) -> dict[str, Any]:
    """What report.json holds, but for the few-shot half.

    Args:
        written: the merged adapter, read back from where it was written.
        reference: label of the adapter that the others were matched to.
    """
    errors: Mapping[str, float] = {}
    if not made_of.copied:
        errors = merged.deviations
        if written.kind == "bottleneck":
            errors = quality.function_errors(written, made_of.adapters, made_of.weights)
    return {
        "method": made_of.method,
        "kind": written.kind,
        "reference": reference,
        "distance": f"{config.metric}, of {_compared(config, made_of.method)}",
        "tracks": made_of.said,
        "heads": config.heads,
        "adapters": [
            {
                "label": adapter.label,
                "weight": weight,
                "base": adapter.base,
                "licence": adapter.licence,
                "head": bool(adapter.head),
                **_alignment(list(merged.matchings.get(adapter.label, {}).values())),
            }
            for adapter, weight in zip(made_of.adapters, made_of.weights, strict=True)
        ],
        "alignment": _alignment([one for sites in merged.matchings.values() for one in sites.values()]),
        "sites": {site: errors[site] for site in sorted(errors, key=_by_depth)},
        "drift": _drifts(made_of.adapters, written, base, progress),
        "parameters": {"before": sum(map(costs.parameters, made_of.adapters)), "after": costs.parameters(written)},
        "flops": costs.table(made_of.adapters, written),
    }


def summary(found: Mapping[str, Any], run: str) -> dict[str, Any]:
    """What standard output gets of the facts `found`."""
    told: dict[str, Any] = {
        "method": found["method"],
        "adapters": {each["label"]: each["weight"] for each in found["adapters"]},
        "drift": None,
        "alignment": {name: brief(value) for name, value in found["alignment"].items()},
    }
    if found["drift"]:
        drift = found["drift"][found["reference"]]
        told["drift"] = {name: brief(drift[name]) for name in ("maximum", "relative", "divergence", "agreement")}
    if found["few_shot"]:
        told["few_shot"] = {
            arm["arm"]: {name: arm[name] and brief(arm[name]["mean"]) for name in ("accuracy", "nll")}
            for arm in found["few_shot"]["arms"]
        }
    return told | {"run": run}


def _by_depth(site: str) -> list[tuple[int, str]]:
    """Sorts sites as the model runs through them: layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in site.split(".")]


def _compared(config: Config, method: str) -> str:
    """What of two units is compared."""
    if method == "acts":
        return f"activations {'before' if config.act == 'pre' else 'after'} the nonlinearity"
    return {"down": "incoming weights", "down+bias": "incoming weights and bias", "down+up": "weights in and out"}[
        config.features
    ]


def _alignment(matchings: Sequence[Matching]) -> dict[str, float | None]:
    """Cost of matching before and after, and the share of units that moved, over all of `matchings`; None of none."""
    if not matchings:
        return {"cost_before": None, "cost_after": None, "moved": None}
    before = [matching.cost_before for matching in matchings]
    units = [len(matching.plan) for matching in matchings]
    moved = math.fsum(one.moved * count for one, count in zip(matchings, units, strict=True)) / sum(units)
    return {
        "cost_before": None if None in before else math.fsum(cost for cost in before if cost is not None),
        "cost_after": math.fsum(matching.cost_after for matching in matchings),
        "moved": moved,
    }


def _drifts(
    adapters: Sequence[Adapter], written: Adapter, base: quality.Base | None, progress: Progress
) -> dict[str, Any] | None:
    """By label, how far the base with the merged adapter is from the base with that one."""
    if base is None:
        return None
    return {adapter.label: plain(quality.model_drift(base, adapter, written, progress)) for adapter in adapters}
