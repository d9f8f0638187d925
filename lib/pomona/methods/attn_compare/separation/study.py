"""The study `separation`: base points, sweeps and amplitudes of every kernel, simulated and calculated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pomona.errors import UsageError
from pomona.methods.attn_compare import kernels
from pomona.methods.attn_compare.config import Config
from pomona.methods.attn_compare.kernels import Kernel
from pomona.methods.attn_compare.rows import Point, Workshop
from pomona.methods.attn_compare.separation import theory
from pomona.methods.attn_compare.separation.constants import Constants, fitted, own_grids, parse, unmet
from pomona.methods.attn_compare.separation.construction import (
    Maps,
    Network,
    Outputs,
    dense_difference,
    feature_maps,
    outputs,
    shares,
)
from pomona.methods.attn_compare.separation.findings import draw, section, summary
from pomona.methods.attn_compare.separation.signs import Signs, drawn
from pomona.methods.attn_compare.separation.trials import simulate
from pomona.runtime.progress import Progress
from pomona.runtime.seeds import derive
from pomona.runtime.settings import Settings

__all__ = ["draw", "measure", "plan", "prepare", "section", "sources", "summary"]

STUDY = "separation"
KERNELS = "exp,linear,pow:2,pow:4,pow:6,pow:8,pow:16,taylor2,elu1,favor:16,favor:256,favor:4096"
SWEPT_KERNELS = "exp,linear,pow:4,pow:8,elu1,favor:256"

_ABOVE = 1.1
"""The preset `finite` has a_1 at this many times the amplitude where softmax begins to separate."""

_SIZES = (200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)
_MOST_TOKENS = 4000  # whose n x n attention is still small
_MOST_PRODUCTS = 10**10
_ABSENT = {
    "weight": "at amplitude a1 = 0 the special token does not show",
    "weight_d0": "at amplitude a0 = 0 the special token does not show",
    "best_threshold_accuracy": "a threshold takes two trials",
    "dense_difference": f"token by token takes n up to {_MOST_TOKENS} and fewer features",
}
_AMPLITUDES = (0.0, *np.geomspace(1e-3, 5e5, 200).tolist())


def plan(config: Config, settings: Settings) -> list[Point]:
    """Every kernel at the base point, then every sweep, then the search for amplitudes.

    Raises:
        UsageError: constants without a construction, or outside the theorem under the preset `paper`.
    """
    base = _base(config)
    chosen = kernels.chosen(config.kernels or KERNELS)
    common = {
        "trials": config.trials,
        "seed": settings.seed,
        "preset": config.preset,
        "dense_check": config.dense_check,
    }

    def point(part: str, kernel: Kernel, each: list[Constants]) -> Point:
        constants = [dataclasses.asdict(one) for one in each]
        name = f"{STUDY}/{part}/{kernel.name}"
        return Point(STUDY, name, {**common, "part": part, "kernel": kernel.name, "constants": constants})

    points = [point("base", kernel, [base]) for kernel in chosen]
    given = dict(map(parse, config.sweep))
    swept = chosen if given or config.kernels else kernels.chosen(SWEPT_KERNELS)
    for name, values in (given or own_grids(base)).items():
        if name == "p":
            sizes = given.get("n", (base.n,)) if given else sorted({fitted(n, base.d) for n in (*_SIZES, base.n)})
            each = [_varied(config, base, "n", n) for n in sizes]
            powers = _powers(values) if given or any(k.name.startswith("pow:") for k in chosen) else []
            points += [point("p", power, each) for power in powers]
        else:
            each = [_varied(config, base, name, value) for value in values]
            points += [point(name, kernel, each) for kernel in swept]
    if config.find_amplitude:
        points += [point("amplitude", kernel, [base]) for kernel in chosen]
    return points


def _base(config: Config) -> Constants:
    n = fitted(config.n, config.d) if config.fit_n else config.n
    a1 = 1.0 if config.a1 is None else config.a1
    constants = Constants(n, config.d, config.m, config.a0, a1, config.c, config.variant, config.g)
    if config.preset == "paper":
        if broken := unmet(constants):
            raise UsageError(f"--preset paper: {broken[0]}", hint="--preset finite takes constants outside the theorem")
    elif config.a1 is None:
        least = theory.critical_amplitude(n, constants.b, config.g if config.variant == "cross" else None)
        constants = dataclasses.replace(constants, a1=round(_ABOVE * least, 3))
    if constants.a1 <= constants.a0:
        raise UsageError(
            f"a0 = {constants.a0:g} is not below a1 = {constants.a1:g}: D1 must have the larger amplitude",
            hint="lower --a0 or raise --a1",
        )
    return constants


def _varied(config: Config, base: Constants, name: str, value: float) -> Constants:
    told = {**dataclasses.asdict(base), name: value}
    if config.fit_n:
        told["n"] = fitted(told["n"], told["d"])
    return Constants(**told)


def _powers(values: Sequence[float]) -> list[Kernel]:
    for p in values:
        if p < 2 or p % 2:
            raise UsageError(f"--sweep p={p}: degrees are even, from 2; odd powers have negative weights")
    return [kernels.find(f"pow:{p}") for p in values]


def sources(config: Config, settings: Settings) -> dict[str, Any]:
    """Nothing is read: the data sets are formulas."""
    return {}


def prepare(config: Config, settings: Settings, shop: Workshop, progress: Progress) -> None:
    """Nothing is shared."""


def measure(point: Point, shop: Workshop) -> list[dict[str, Any]]:
    """A row for each of the point's constants; always on the processor, in float64."""
    told = point.settings
    kernel = kernels.find(told["kernel"])
    one = _amplitude if told["part"] == "amplitude" else _separation
    rows = []
    for settings in told["constants"]:
        constants = Constants(**settings)
        row = {
            "study": STUDY,
            "kernel": kernel.name,
            "point": {
                "part": told["part"],
                **constants.described(),
                "trials": told["trials"],
                "seed": told["seed"],
                "preset": told["preset"],
                "provenance": "recalled" if told["preset"] == "paper" else "recalled; a1 for this n",
                "within_theorem": not unmet(constants),
            },
        }
        rows.append(row | (_skipped(kernel, constants, told) or one(kernel, constants, told)))
    return rows


def _skipped(kernel: Kernel, constants: Constants, told: Mapping[str, Any]) -> dict[str, Any] | None:
    if not kernel.positional:
        return None
    if told["part"] == "amplitude":
        return {"status": "skipped", "reason": f"{kernel.name} depends on positions and has no one weight to solve for"}
    products = 3 * constants.n * constants.d * constants.m * told["trials"]
    if constants.n <= _MOST_TOKENS and products <= _MOST_PRODUCTS:
        return None
    reason = (
        f"{kernel.name} depends on positions, so all {constants.n} tokens count: {products:.1e} products are too many"
    )
    return {"status": "skipped", "reason": reason}


def _separation(kernel: Kernel, constants: Constants, told: Mapping[str, Any]) -> dict[str, Any]:
    maps = feature_maps(kernel, constants.n, derive(told["seed"], f"{STUDY} {kernel.name}"))
    zeroth, first = (outputs(kernel, constants, a, maps) for a in (constants.a0, constants.a1))
    if not all(np.isfinite(network.rows).all() for network in (zeroth, first)):
        return {"status": "failed", "reason": f"the weights of {kernel.name} are beyond float64 at these constants"}
    values, intervals = simulate(constants, zeroth, first, told["trials"], told["seed"]).measured()
    weight0, weight1 = (
        _weight(network, constants, a) for network, a in ((zeroth, constants.a0), (first, constants.a1))
    )
    values |= {
        "weight": weight1,
        "weight_d0": weight0,
        "margin": None if weight1 is None else weight1 * (constants.a1 + constants.b),
    }
    if told["dense_check"]:
        values["dense_difference"] = _dense_difference(kernel, constants, maps, told["seed"])
    calculated: dict[str, float] = {}
    if isinstance(zeroth, Outputs) and isinstance(first, Outputs):
        calculated = _calculated(kernel, constants, zeroth, first)
    row = {"status": "done", "values": values, "intervals": intervals, "theory": calculated}
    reasons = [why for name, why in _ABSENT.items() if values.get(name, 0) is None]
    return row | ({"reason": "; ".join(reasons)} if reasons else {})


def _weight(network: Network, constants: Constants, a: float) -> float | None:
    """f*: of all tokens only the special one has an entry in the first column."""
    return float(network.rows[0, 0]) / (a * constants.unit) if a else None


def _calculated(kernel: Kernel, constants: Constants, zeroth: Outputs, first: Outputs) -> dict[str, float]:
    exact = theory.Lattice(constants, zeroth, first)
    names = ("success", "d1_fires", "d0_silent", "hit_rate", "alarm_rate")
    found: dict[str, float] = {name: getattr(exact, name) for name in names}
    found["auc"], found["best_threshold_accuracy"] = exact.ranking()
    a0, a1, b, c = constants.a0, constants.a1, constants.b, constants.c
    weight0, weight1 = (theory.closed_weight(kernel, constants.n, a, constants.row_sum(a)) for a in (a0, a1))
    if weight0 is not None and weight1 is not None:
        hit, early = theory.hit_rate(weight1, a1, b, c), theory.hit_rate(weight0, a0, b, c)
        alarm = max(theory.alarm_rate(b, constants.d - 2), early)
        found |= {
            "weight": weight1,
            "weight_d0": weight0,
            "margin": weight1 * (a1 + b),
            "success_leading": theory.success_rate(hit, alarm, constants.m),
        }
    return found


def _dense_difference(kernel: Kernel, constants: Constants, maps: Maps | None, seed: int) -> float | None:
    """Of both data sets, under the sign vectors of one trial; None where n is too large for all tokens."""
    each = max(constants.d, kernel.features(1) or 1)
    if constants.n > _MOST_TOKENS or constants.n**2 * each > _MOST_PRODUCTS:
        return None
    (signs,) = drawn(f"{STUDY}/{seed}/{constants}/dense", 1, constants.m, constants.d)
    of_one = Signs(signs.words[0], constants.d)
    return max(dense_difference(kernel, constants, a, maps, of_one) for a in (constants.a0, constants.a1))


def _amplitude(kernel: Kernel, constants: Constants, told: Mapping[str, Any]) -> dict[str, Any]:
    """The a1 where f* (a1 + b) reaches 0.1, and the success a tenth below, at and a tenth above it."""
    maps = feature_maps(kernel, constants.n, derive(told["seed"], f"{STUDY} {kernel.name}"))

    def margin(a: float) -> float:
        return float(shares(kernel, constants, a, maps)[0, 0]) * (a + constants.b)

    def closed(a: float) -> float:
        weight = theory.closed_weight(kernel, constants.n, a, constants.row_sum(a))
        return math.nan if weight is None else weight * (a + constants.b)

    found, calculated = (theory.crossing(of, _AMPLITUDES) for of in (margin, closed))
    values: dict[str, float | None] = {"amplitude": found}
    row: dict[str, Any] = {"status": "done", "values": values, "intervals": {}, "theory": {}}
    if calculated is not None:
        row["theory"]["amplitude"] = calculated
    if found is None:
        return row | {"reason": f"no amplitude up to {_AMPLITUDES[-1]:g} lifts f* (a1 + b) to 0.1"}
    for name, factor in (("below", 0.9), ("at", 1.0), ("above", 1.1)):
        here = dataclasses.replace(constants, a1=factor * found)
        tried = _separation(kernel, here, {**told, "dense_check": False})
        for kind in ("values", "intervals", "theory"):
            if "success" in tried.get(kind, {}):
                row[kind][f"success_{name}"] = tried[kind]["success"]
    return row
