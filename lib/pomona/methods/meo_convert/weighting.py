"""How much each expert counts in a static merge, which one the others are matched to, and what the gates let pass."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pomona.errors import DataError, MissingError, UsageError
from pomona.methods.meo_convert.config import Config
from pomona.methods.meo_convert.families import Family
from pomona.methods.meo_convert.routing import Routing


def weights(family: Family, choice: str, routing: Mapping[str, Routing] | None = None) -> dict[str, list[float]]:
    """Weights of the experts of each layer; they sum to 1.

    Args:
        choice: uniform, router-frequency, router-prob, or the path of a JSON file: a list for all layers, or an object
            with a list for each.
        routing: of a mixture on calibration text; for the two in the middle.

    Raises:
        MissingError: the file is missing or no JSON.
        DataError: the file's weights are not one for each expert, or not usable.
        UsageError: the model has no router to ask.
    """
    if choice == "uniform":
        return {layer.name: [1 / layer.experts] * layer.experts for layer in family.layers}
    if choice in ("router-frequency", "router-prob"):
        if routing is None or family.kind != "mixture":
            raise UsageError(
                f"--weights {choice}: {family.name} has no router that chooses for each token",
                hint="use --weights uniform or a .json file",
            )
        kind = "frequency" if choice == "router-frequency" else "probability"
        return {layer.name: getattr(routing[layer.name], kind).tolist() for layer in family.layers}
    return _read(Path(choice), family)


def references(family: Family, choice: str, routing: Mapping[str, Routing] | None) -> dict[str, int]:
    """The expert of each layer that the others are matched to; without routing, most-used is the first.

    Raises:
        UsageError: there is no such expert.
    """
    if choice == "most-used":
        used = routing or {}
        return {
            layer.name: int(used[layer.name].frequency.argmax()) if layer.name in used else 0 for layer in family.layers
        }
    if int(choice) >= family.experts:
        raise UsageError(f"--reference-expert {choice}: the experts are 0 to {family.experts - 1}")
    return {layer.name: int(choice) for layer in family.layers}


def mass(family: Family, choice: str, routing: Mapping[str, Routing] | None) -> dict[str, float]:
    """What scales the output map of each layer: the mean sum of the chosen gates, where they are not normalised.

    Args:
        choice: keep or one.

    Raises:
        UsageError: the gates are not normalised, and nobody looked how much they let pass.
    """
    if choice == "one" or not _leaks(family):
        return {}
    if routing is None:
        raise UsageError("--mass keep needs routing on calibration text", hint="use --mass one")
    return {layer.name: routing[layer.name].mass for layer in family.layers}


def needs_routing(family: Family, config: Config) -> bool:
    """Whether the mixture must be run on text before it can be merged."""
    if config.align == "activations" or (config.weights or "").startswith("router-"):
        return True
    return config.mass == "keep" and _leaks(family)


def _leaks(family: Family) -> bool:
    """Whether the gates of the chosen experts may sum to less than 1."""
    return family.kind == "mixture" and not family.normalised and family.selected < family.experts


def _read(path: Path, family: Family) -> dict[str, list[float]]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise MissingError(f"--weights {path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"--weights {path}: it is not JSON: {error}") from error
    if isinstance(content, dict):
        names = [layer.name for layer in family.layers]
        if lacking := [name for name in names if name not in content]:
            raise DataError(f"--weights {path}: layer {lacking[0]} is missing", hint=f"expected: {_some(names)}")
        if stray := sorted(content.keys() - set(names)):
            raise DataError(f"--weights {path}: there is no layer {stray[0]}", hint=f"expected: {_some(names)}")
        return {name: _usable(path, name, content[name], family.experts) for name in names}
    found = _usable(path, "all layers", content, family.experts)
    return {layer.name: found for layer in family.layers}


def _usable(path: Path, place: str, values: Any, experts: int) -> list[float]:
    if not isinstance(values, list) or len(values) != experts:
        raise DataError(f"--weights {path}: {place}: expected a list of {experts} numbers, one for each expert")
    if not all(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max
        for value in values
    ):
        raise DataError(f"--weights {path}: {place}: weights must be finite numbers of 0 or more")
    total = float(sum(map(float, values)))
    if not (math.isfinite(total) and total > 0):
        raise DataError(f"--weights {path}: {place}: the weights sum to {total}")
    return [value / total for value in values]


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:6])}, ... {names[-1]}"
