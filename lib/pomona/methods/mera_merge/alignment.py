"""Which unit of a bottleneck is which of the reference's, by optimal transport, and the bottleneck in that order.

An adapter h + U phi(D h + b) + c reads from and writes to the residual stream, whose basis is fixed: what OTFusion
(Singh and Jaggi, arXiv 1910.05653) would transport at its input and output stays as it is, and the r units between are
matched alone. With uniform marginals, T = argmin <T, C> over plans, and P = r T whose rows sum to 1,

    D' = P D,   b' = P b,   U' = U P^T,   c' = c.

Between equal widths an optimal plan is a permutation (Birkhoff), and the aligned adapter computes what it did. Plans of
Sinkhorn, and those between unequal widths, blend units and change the function.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pomona.errors import CheckFailed, DataError, UnavailableError
from pomona.methods.mera_merge.adapters import Bottleneck
from pomona.models.matching import Metric, assignment, distances

Kind = Literal["down", "down+bias", "down+up"]

_ITERATIONS = 10_000
_MARGINAL = 1e-9  # of a total mass of 1, where Sinkhorn stops
_CONVERGED = 1e-3  # of a unit's mass; small REG come no closer in any number of iterations one would wait for
_PIVOTS = 10_000_000


@dataclass(frozen=True)
class Matching:
    """How the units of a reference and of another bottleneck correspond.

    Attributes:
        plan: (r_ref, r_other), float64; rows sum to 1.
        permutation: (r,), where the plan is one: unit i of the reference is unit permutation[i] of the other.
        cost_before: sum of the distances of the units in the order they come in; None between unequal widths.
        cost_after: <plan, C>.
        moved: share of the reference's units whose largest share of the plan is not in their own place.
    """

    plan: Tensor
    permutation: Tensor | None
    cost_before: float | None
    cost_after: float
    moved: float

    @property
    def digest(self) -> str:
        """SHA-256 of the permutation as little-endian int64, or else of the plan as little-endian float64."""
        decisive, dtype = (self.plan, "<f8") if self.permutation is None else (self.permutation, "<i8")
        return hashlib.sha256(decisive.contiguous().numpy().astype(dtype).tobytes()).hexdigest()


def features(site: Bottleneck, kind: Kind) -> Tensor:
    """What describes each unit, (r, f), float64: incoming weights, then the bias too, then outgoing weights too."""
    parts = [site.down]
    if kind != "down":
        parts.append(site.down_bias[:, None])
    if kind == "down+up":
        parts.append(site.up.T)
    return torch.cat([part.double() for part in parts], 1)


def match(
    reference: Tensor, other: Tensor, *, solver: float | None, metric: Metric, transport: bool = True
) -> Matching:
    """Match the units of `other` to those of `reference`.

    Args:
        reference: features (r_ref, f).
        other: features (r_other, f).
        solver: None for an exact plan, or the entropic regularisation of Sinkhorn, as a share of the largest distance.
        transport: between unequal widths find an exact plan, by the network simplex of POT. Between equal ones it is
            the cheapest assignment, which SciPy finds sooner and without rounding.

    Raises:
        CheckFailed: a distance is not finite, or Sinkhorn did not converge.
        DataError: the features are not of one width, or widths are unequal where an assignment is asked for.
        UnavailableError: POT is not installed.
    """
    if reference.shape[1] != other.shape[1]:
        raise DataError(f"units are described by {reference.shape[1]} and by {other.shape[1]} features")
    cost = distances(reference, other, metric).cpu()
    if solver is not None:
        return _matching(cost, _sinkhorn(cost, solver), None)
    if cost.shape[0] == cost.shape[1]:
        permutation = assignment(cost)
        return _matching(cost, torch.zeros_like(cost).scatter_(1, permutation[:, None], 1.0), permutation)
    if not transport:
        raise DataError(
            f"{cost.shape[0]} and {cost.shape[1]} units cannot be assigned one to one",
            hint="--method wts transports between unequal widths",
        )
    return _matching(cost, _exact(cost), None)


def aligned(site: Bottleneck, matching: Matching) -> Bottleneck:
    """`site` with its units in the reference's places; its numbers are untouched where the plan is a permutation.

    Between unequal widths the outgoing weights of a unit are shared out whole, P^T times r_other / r_ref, so that a
    reference whose units are split copies of the other's, or the other way round, still computes the same.
    """
    if matching.permutation is not None:
        order = matching.permutation.to(site.down.device)
        return replace(site, down=site.down[order], down_bias=site.down_bias[order], up=site.up[:, order])
    plan = matching.plan.to(site.down.device)
    shared = plan.T * (plan.shape[1] / plan.shape[0])
    return replace(
        site,
        down=(plan @ site.down.double()).to(site.down.dtype),
        down_bias=(plan @ site.down_bias.double()).to(site.down_bias.dtype),
        up=(site.up.double() @ shared).to(site.up.dtype),
    )


# --- plans -----------------------------------------------------------------------------------------------------------


def _exact(cost: Tensor) -> Tensor:
    """An optimal plan, rows scaled to 1. Masses are whole numbers, so that the simplex makes no rounding errors."""
    ours, theirs = cost.shape
    plan, log = _pot().emd(
        np.full(ours, float(theirs)),
        np.full(theirs, float(ours)),
        cost.numpy(),
        numItermax=_PIVOTS,
        log=True,
    )
    if log["warning"] is not None:
        raise CheckFailed(f"no optimal plan was found between {ours} and {theirs} units: {log['warning']}")
    return torch.from_numpy(plan) / theirs


def _sinkhorn(cost: Tensor, regularisation: float) -> Tensor:
    """The plan of least <T, C> / max C - REG entropy(T), rows scaled to 1; iterated on logarithms."""
    ours, theirs = cost.shape
    with np.errstate(over="ignore"):  # where it does not converge, which is found below
        plan = _pot().sinkhorn(
            np.full(ours, 1 / ours),
            np.full(theirs, 1 / theirs),
            (cost / cost.max().clamp(min=torch.finfo(cost.dtype).tiny)).numpy(),
            regularisation,
            method="sinkhorn_log",
            numItermax=_ITERATIONS,
            stopThr=_MARGINAL,
            warn=False,
        )
    rows = torch.from_numpy(plan)
    masses = torch.cat([rows.sum(1) * ours, rows.sum(0) * theirs])
    if not float((masses - 1).abs().max()) <= _CONVERGED:
        raise CheckFailed(
            f"sinkhorn:{regularisation:g} did not converge in {_ITERATIONS} iterations",
            hint="use a larger REG, or --solver exact",
        )
    return rows / rows.sum(1, keepdim=True)


def _pot() -> Any:
    try:
        import ot
    except ImportError as error:
        raise UnavailableError(
            "optimal transport needs the package POT", hint="pip install 'pomona[merge]', or use --method assign"
        ) from error
    return ot


def _matching(cost: Tensor, plan: Tensor, permutation: Tensor | None) -> Matching:
    places = torch.arange(len(plan))
    return Matching(
        plan=plan,
        permutation=permutation,
        cost_before=float(cost.diagonal().sum()) if cost.shape[0] == cost.shape[1] else None,
        cost_after=float((plan * cost).sum()),
        moved=float((plan.argmax(1) != places).double().mean()),
    )
