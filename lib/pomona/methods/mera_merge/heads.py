"""The prediction heads that adapters come with: dropped, the reference's, or their average."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from pomona.errors import CheckFailed, DataError, UsageError
from pomona.methods.mera_merge.adapters import Adapter

Choice = Literal["drop", "keep-reference", "average"]
Head = tuple[dict[str, Tensor], Mapping[str, Any] | None]
"""Tensors by their names in the reference's file, and its ``head_config.json``."""

_HINT = "--heads drop leaves them out, keep-reference takes the reference's"


def merged(adapters: Sequence[Adapter], *, choice: Choice, weights: Sequence[float], reference: int) -> Head:
    """The head of the merged adapter. An average is sum_i w_i theta_i / sum_i w_i, whatever the adapters' method.

    Raises:
        CheckFailed: a tensor of the average is not finite.
        DataError: a head that is needed is missing, or heads to average differ in their settings, labels or shapes.
        UsageError: the weights sum to 0.
    """
    chosen = adapters[reference]
    if choice == "drop":
        return {}, None
    needed = [chosen] if choice == "keep-reference" else adapters
    if lacking := [adapter.label for adapter in needed if not adapter.head]:
        raise DataError(f"--heads {choice}: {', '.join(lacking)} came without a prediction head", hint=_HINT)
    if choice == "keep-reference":
        return dict(chosen.head), chosen.head_config
    for other in adapters:
        _alike(chosen, other)
    total = math.fsum(weights)
    if abs(total) <= 1e-9 * math.fsum(map(abs, weights)):
        raise UsageError("--weights sum to 0, and heads cannot be averaged by them", hint=_HINT)
    by_role = [_roles(adapter) for adapter in adapters]
    found: dict[str, Tensor] = {}
    for role, name in by_role[reference].items():
        values = [adapter.head[roles[role]].double() for adapter, roles in zip(adapters, by_role, strict=True)]
        mean = values[0] * (weights[0] / total)
        for weight, value in zip(weights[1:], values[1:], strict=True):
            mean.add_(value, alpha=weight / total)
        found[name] = mean.to(chosen.head[name].dtype)
        if not bool(found[name].isfinite().all()):
            raise CheckFailed(f"{name} is not finite once averaged", hint=_HINT)
    return found, chosen.head_config


def _alike(chosen: Adapter, other: Adapter) -> None:
    """Refuse heads that are not the same function of their parameters (DataError)."""
    between = f"the heads of {chosen.label} and {other.label} differ"
    ours, theirs = _settings(chosen), _settings(other)
    for key in (*ours, *theirs):
        if ours.get(key) != theirs.get(key):
            raise DataError(f"{between} in {key}: {ours.get(key)!r:.80} and {theirs.get(key)!r:.80}", hint=_HINT)
    one, two = _roles(chosen), _roles(other)
    for role in (*one, *two):
        shapes = [
            tuple(adapter.head[roles[role]].shape) if role in roles else None
            for adapter, roles in ((chosen, one), (other, two))
        ]
        if shapes[0] != shapes[1]:
            raise DataError(f"{between} in {role}: {shapes[0]} and {shapes[1]}", hint=_HINT)


def _settings(adapter: Adapter) -> Mapping[str, Any]:
    inner = (adapter.head_config or {}).get("config")
    return inner if isinstance(inner, Mapping) else {}


def _roles(adapter: Adapter) -> dict[str, str]:
    """Names of a head's tensors by what is left of them without the head's own name."""
    own = f"heads.{(adapter.head_config or adapter.config).get('name')}."
    return {name.removeprefix(own): name for name in adapter.head}
