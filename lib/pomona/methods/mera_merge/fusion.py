"""Bottleneck adapters fused into one: summed, averaged, or averaged once their units are in the reference's places.

The methods of MerA (arXiv 2308.15982): sum_i w_i theta_i of the adapters as they are (``sum``, ``avg``), or aligned to
a fixed reference first, by transport on weights (``wts``) or activations (``acts``), or by assignment on weights
(``assign``). Sums are in float64 and are cast once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

from torch import Tensor

from pomona.errors import CheckFailed, DataError, UsageError
from pomona.methods.mera_merge import adapterhub
from pomona.methods.mera_merge.adapters import Adapter, Bottleneck
from pomona.methods.mera_merge.alignment import Kind, Matching, aligned, match
from pomona.methods.mera_merge.alignment import features as described
from pomona.models.matching import Metric

ALIGNING = ("wts", "acts", "assign")
_MOVED = ("down", "down_bias", "up")

Activations = Mapping[str, Mapping[str, Tensor]]
"""label -> site -> (tokens, r), the same tokens for every adapter."""


@dataclass(frozen=True)
class Fused:
    """The fused adapter, in the reference's format and number formats, without a prediction head.

    Attributes:
        sites: label -> site -> how that adapter's units were matched to the reference's; empty for avg and sum.
        provenance: tensor -> its number format, and for each source its adapter, tensor, weight, and the digest of the
            permutation or plan that its units went through, if any.
    """

    adapter: Adapter
    sites: Mapping[str, Mapping[str, Matching]]
    provenance: Mapping[str, Mapping[str, Any]]


def shares(weights: Sequence[float] | None, count: int, *, method: str, normalize: bool) -> list[float]:
    """The weights of `count` adapters: all alike where none are given, and summing to 1 where `normalize` says so.

    Those of ``sum`` are 1 unless given, and never normalised.

    Raises:
        UsageError: there are more or fewer weights than adapters, or they sum to 0 or beyond all numbers.
    """
    if weights is None:
        return [1.0 if method == "sum" else 1 / count] * count
    if len(weights) != count:
        raise UsageError(f"--weights gives {len(weights)} for {count} adapters", hint="give one for each, in order")
    if method == "sum" or not normalize:
        return list(weights)
    try:
        total, size = math.fsum(weights), math.fsum(map(abs, weights))
    except OverflowError as error:
        raise UsageError("--weights are too large to be summed", hint="only their ratios count") from error
    if abs(total) <= 1e-9 * size:
        raise UsageError("--weights sum to 0 and cannot be normalised", hint="change them, or use --no-normalize")
    return [weight / total for weight in weights]


def fuse(
    adapters: Sequence[Adapter],
    *,
    method: str,
    weights: Sequence[float],
    reference: int,
    features: Kind,
    metric: Metric,
    solver: float | None,
    activations: Activations | None,
) -> Fused:
    """One adapter of several that `compatibility.check` let pass. A single one of weight 1 keeps every bit.

    Args:
        weights: of the adapters, used as they are.
        reference: place of the adapter whose units, names and number formats the result has.
        features: what describes a unit to ``wts`` and ``assign``.
        solver: of ``wts`` and ``acts``: None for exact plans, or the regularisation of Sinkhorn.
        activations: of ``acts``.

    Raises:
        CheckFailed: a tensor of the result is not finite, or a plan was not found.
        DataError: unequal widths cannot be fused by `method`.
        UnavailableError: POT is not installed, which unequal widths and Sinkhorn need.
    """
    labels = [adapter.label for adapter in adapters]
    chosen = adapters[reference]
    # Always summed in the order of their labels, so that the order they come in decides no bit.
    rest = sorted((i for i in range(len(adapters)) if i != reference), key=lambda i: labels[i])
    matchings: dict[str, dict[str, Matching]] = {}
    if method in ALIGNING:
        view = _View(method, features, metric, solver, activations)
        matchings = {labels[i]: view.match(chosen, adapters[i]) for i in sorted(rest)}
    terms = [_Term(adapters[i], weights[i], matchings.get(labels[i], {})) for i in (reference, *rest)]
    tensors: dict[str, Tensor] = {}
    provenance: dict[str, Mapping[str, Any]] = {}
    for name, value, sources in _sum(terms):
        dtype = chosen.tensors[name].dtype
        tensors[name] = value.to(dtype)
        if not bool(tensors[name].isfinite().all()):
            raise CheckFailed(f"{name} is not finite once merged", hint="are weights large, or is the format narrow?")
        provenance[name] = {"dtype": str(dtype).removeprefix("torch."), "sources": sources}
    fused = dataclasses.replace(
        chosen,
        label="merged",
        tensors={name: tensors[name] for name in chosen.tensors},
        head={},
        head_config=None,
    )
    return Fused(fused, matchings, {name: provenance[name] for name in chosen.tensors})


def medoid(
    adapters: Sequence[Adapter],
    *,
    method: str,
    features: Kind,
    metric: Metric,
    solver: float | None,
    activations: Activations | None,
) -> int:
    """Place of the adapter that is nearest to all others: of the least total <P, C> / r, over the others and all sites.

    Distances are those that `fuse` would match by; for ``avg`` and ``sum``, those of ``assign``. Of several nearest, it
    is the first.
    """
    view = _View(method if method in ALIGNING else "assign", features, metric, solver, activations)
    totals = [0.0] * len(adapters)
    for one, other in combinations(range(len(adapters)), 2):
        found = view.match(adapters[one], adapters[other])
        apart = math.fsum(matching.cost_after / len(matching.plan) for matching in found.values())
        totals[one] += apart
        totals[other] += apart
    return min(range(len(adapters)), key=totals.__getitem__)


# --- units in their places -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """How two adapters are looked at to match their units."""

    method: str
    features: Kind
    metric: Metric
    solver: float | None
    activations: Activations | None

    def match(self, reference: Adapter, other: Adapter) -> dict[str, Matching]:
        """How the units of `other` are matched to those of `reference`, by site."""
        ours, theirs = self._described(reference), self._described(other)
        exact = self.method == "assign"
        found = {}
        for site in ours:
            try:
                found[site] = match(
                    ours[site],
                    theirs[site],
                    solver=None if exact else self.solver,
                    metric=self.metric,
                    transport=not exact,
                )
            except (CheckFailed, DataError) as error:
                message = f"{reference.label} and {other.label}: {site}: {error.message}"
                raise type(error)(message, hint=error.hint) from error
        return found

    def _described(self, adapter: Adapter) -> dict[str, Tensor]:
        sites = adapter.sites()
        if self.method != "acts":
            return {name: described(site, self.features) for name, site in sites.items()}
        if self.activations is None:
            raise ValueError("acts needs activations")
        return {name: self.activations[adapter.label][name].T for name in sites}


# --- sums ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Term:
    """What one adapter adds to a sum."""

    adapter: Adapter
    weight: float
    matchings: Mapping[str, Matching]

    @cached_property
    def names(self) -> dict[str, dict[str, str]]:
        """Names of the tensors by site and by what they are there; "" is the site of those that belong to none."""
        beside = adapterhub.beside_sites(self.adapter.tensors, self.adapter.config)
        sites = adapterhub.site_names(self.adapter.tensors, self.adapter.config)
        return {**sites, **({"": {name: name for name in beside}} if beside else {})}

    def tensors(self, site: str) -> dict[str, Tensor]:
        """What `site` holds, in float64, its units in the reference's places."""
        found = {part: self.adapter.tensors[name].double() for part, name in self.names.get(site, {}).items()}
        matching = self.matchings.get(site)
        return found if matching is None else vars(aligned(Bottleneck(**found), matching))

    def source(self, site: str, part: str) -> dict[str, Any]:
        source: dict[str, Any] = {
            "adapter": self.adapter.label,
            "tensor": self.names[site][part],
            "weight": self.weight,
        }
        matching = self.matchings.get(site)
        if matching is not None and part in _MOVED:
            source["plan" if matching.permutation is None else "permutation"] = matching.digest
        return source


def _sum(terms: Sequence[_Term]) -> Iterator[tuple[str, Tensor, list[dict[str, Any]]]]:
    """Each tensor of the first term by its name there: the weighted sum over all terms, in float64, and its sources."""
    for site, names in terms[0].names.items():
        held = [term.tensors(site) for term in terms]
        for part, name in names.items():
            total = held[0][part] * terms[0].weight
            for term, tensors in zip(terms[1:], held[1:], strict=True):
                value = tensors.get(part)
                if value is None or value.shape != total.shape:
                    raise DataError(
                        f"{name} is {tuple(total.shape)}, and in {term.adapter.label} it is "
                        f"{'missing' if value is None else tuple(value.shape)}",
                        hint="adapters of unequal width are merged by wts or acts, with --allow-resize",
                    )
                total.add_(value, alpha=term.weight)
            yield name, total, [term.source(site, part) for term in terms]
