"""`--study speed`: the points, the rows and the section of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pomona.errors import UnavailableError
from pomona.methods.attn_compare import kernels
from pomona.methods.attn_compare.config import Config
from pomona.methods.attn_compare.rows import Point, Row, Workshop
from pomona.methods.attn_compare.speed import costs, findings, implementations, options, race
from pomona.methods.attn_compare.speed.crossover import slope
from pomona.report.sections import Section, Table
from pomona.runtime.progress import Progress
from pomona.runtime.settings import Settings

SMALL_WIDTH = 16  # of a head, up to which taylor2 is timed unless kernels are named
XF_8192 = {"lengths": "8192", "heads": 8, "dim": "128", "passes": "fwd"}


def plan(config: Config, settings: Settings) -> list[Point]:
    """A point for each pass and width: implementations take turns within it, and each length predicts the next."""
    asked = {name: getattr(config, name) for name in XF_8192} | (XF_8192 if config.xf_8192 else {})
    points = []
    for way in options.passes(asked["passes"]):
        for width in options.widths(asked["dim"]):
            by_default = "elu1,taylor2" if width <= SMALL_WIDTH else "elu1"
            entered = implementations.chosen(
                options.implementations(config.impls) if config.impls else list(options.BY_DEFAULT),
                kernels.chosen(config.kernels or by_default),
                way,
                causal=not config.full,
            )
            points.append(
                Point(
                    "speed",
                    f"speed {way} d={width}",
                    {
                        "pass": way,
                        "dim": width,
                        "heads": asked["heads"],
                        "lengths": options.lengths(asked["lengths"]),
                        "implementations": [[each.form, each.kernel.name] for each in entered],
                        "full": config.full,
                        "threads": config.threads,
                        "repeats": config.repeats,
                        "max_bytes": options.memory(config.max_mem),
                        "max_seconds": config.max_seconds,
                        "dtype": settings.dtype,
                        "seed": settings.seed,
                    },
                )
            )
    return points


def sources(config: Config, settings: Settings) -> dict[str, Any]:
    """The study reads nothing."""
    return {}


def prepare(config: Config, settings: Settings, shop: Workshop, progress: Progress) -> None:
    """Refuse a device that has no clock here.

    Raises:
        UnavailableError: the device is neither a processor nor a CUDA device.
    """
    if not shop.device.startswith(("cpu", "cuda")):
        raise UnavailableError(f"speed cannot be timed on {shop.device}", hint="give --device cpu")


def measure(point: Point, shop: Workshop) -> list[dict[str, Any]]:
    """A row for each length and implementation; torch's threads are as before afterwards."""
    return race.rows(point.settings, shop.device)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Crossovers and leads; see `findings.summary`."""
    return findings.summary(rows)


def section(rows: Sequence[Row]) -> Section:
    """What the report says."""
    found = findings.overtakings(rows)
    verdict = [findings.sentence(each) for each in found]
    for each in found:
        if each.place.way == "decode":
            verdict.append(_memory_of_decoding(each, rows))
    if not verdict:
        verdict = ["Nothing was timed of both softmax and a linear form, so there is no crossover to tell."]
    figures = [("speed_time", "Time of a pass against length; the band is from the fastest repeat to the slowest.")]
    if any(row["point"]["pass"] != "decode" for row in rows):
        figures.append(("speed_costs", "Memory (dashed: predicted) and predicted FLOPs of a pass against length."))
    return Section(
        "speed",
        "From which length does linear attention pay?",
        verdict,
        _notes(rows, found),
        [_table(name, group) for name, group in _named(rows).items()],
        figures,
    )


def draw(rows: Sequence[Row], folder: Path) -> None:
    """speed_time and speed_costs."""
    from pomona.report.charts import Panel, Series, curves

    times, weights = [], []
    for name, group in _named(rows).items():
        timed = findings.curves(group)
        lines = [
            Series(
                label,
                list(by_length),
                [row["timing"]["ms"] for row in by_length.values()],
                [min(row["timing"]["ms_all"]) for row in by_length.values()],
                [max(row["timing"]["ms_all"]) for row in by_length.values()],
            )
            for label, by_length in timed.items()
        ]
        crossings = [
            (each.crossover.at, f"n = {each.crossover.at:,.0f}")
            for each in findings.overtakings(group)
            if each.crossover.at is not None
        ]
        times.append(Panel(name, "length n", "ms", lines, log_x=True, log_y=True, verticals=crossings))
        if group[0]["point"]["pass"] == "decode":
            continue
        memory = []
        for label, by_length in timed.items():
            known = {n: row["timing"]["peak_bytes"] for n, row in by_length.items() if row["timing"].get("peak_bytes")}
            if known:
                memory.append(Series(label, list(known), [peak / 1e6 for peak in known.values()]))
            predicted = [row["values"]["bytes"] / 1e6 for row in by_length.values()]
            memory.append(Series(label, list(by_length), predicted, theory=bool(known)))
        arithmetic = [
            Series(label, list(by_length), [row["values"]["flops"] / 1e9 for row in by_length.values()])
            for label, by_length in timed.items()
        ]
        weights.append(Panel(f"memory, {name}", "length n", "MB", memory, log_x=True, log_y=True))
        weights.append(Panel(f"arithmetic, {name}", "length n", "GFLOP", arithmetic, log_x=True, log_y=True))
    curves(folder / "speed_time", "Time against length", times)
    if weights:
        curves(folder / "speed_costs", "Memory and arithmetic against length", weights, columns=2)


def _notes(rows: Sequence[Row], found: Sequence[findings.Overtaking]) -> list[str]:
    timed = [row for row in rows if row["status"] == "done"]
    conditions = dict.fromkeys(place.conditions for place in findings.groups(rows))
    notes = [
        f"Measured with {'; with '.join(conditions)}.",
        "Times are medians of repeats in which the implementations took turns, feature maps included; `map ms` is what "
        "these alone take. The interval of a crossover is a 95 % bootstrap of the repeats.",
        "SDPA is the baseline because it is the fused softmax that people run; to beat eager softmax proves little.",
        "Every implementation timed agrees with the quadratic form in float64 at n = 257, at every chunk size; `error` "
        "is the largest difference.",
        "MB is what a pass holds at once, inputs included: predicted, and measured as the peak of the allocator (GPU) "
        "or of resident memory in a fresh process. GFLOP and MB are predicted at a chunk of 64.",
    ]
    if noisy := sum(map(findings.noisy, timed)):
        by = {row["timing"]["clock"] for row in timed if findings.noisy(row)}
        what = "processor time at one thread counts there" if by == {"cpu"} else "read them with care"
        notes.append(
            f"{noisy} of {len(timed)} timings are noisy: the slowest repeat took more than 1.5 times the fastest, or "
            f"more processes wanted to run than there are cores; {what}."
        )
    for width, kernel, features in dict.fromkeys((e.place.width, e.kernel, e.features) for e in found):
        flops, numbers = costs.flop_crossover(width, features), math.ceil(costs.decode_break_even(width, features))
        notes.append(
            f"By arithmetic alone {kernel} at head width {width} ({features:,} features) would overtake causal softmax "
            f"at n = {flops:,.0f}, and its state is smaller than a cache of keys and values from n = {numbers:,}."
        )
    for name, group in _named(rows).items():
        exponents = [
            f"{implementation} {power:.2f}"
            for implementation, by_length in findings.curves(group).items()
            if (power := slope(list(by_length), [row["timing"]["ms"] for row in by_length.values()])) is not None
        ]
        if exponents:
            notes.append(f"Time grows as n to the power of, {name}: {', '.join(exponents)}.")
    return notes


def _memory_of_decoding(each: findings.Overtaking, rows: Sequence[Row]) -> str:
    held = {
        row["point"]["implementation"]: row["values"]["remembered_bytes"]
        for row in rows
        if findings.Place.of(row) == each.place and row["point"]["length"] == each.longest
    }
    state, cache = (held[name] / 1e6 for name in (each.implementation, findings.BASELINE))
    return (
        f"Decoding with {each.kernel} remembers {state:,.2f} MB at any length; keys and values take {cache:,.2f} MB at "
        f"n = {each.longest:,}."
    )


def _named(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each place, under the name that it has among the others."""
    places = findings.groups(rows)
    return {place.named(places): group for place, group in places.items()}


def _table(name: str, group: Sequence[Row]) -> Table:
    head = ["n", "implementation", "ms", "CPU ms", "map ms", "chunk", "GFLOP", "MB predicted", "MB", "error", "remark"]
    lines = []
    for row in group:
        timing, values = row.get("timing", {}), row["values"]
        remark = row.get("reason") or ("noisy" if findings.noisy(row) else "")
        peak = timing.get("peak_bytes")
        lines.append(
            [
                f"{row['point']['length']:,}",
                row["point"]["implementation"],
                _number(timing.get("ms")),
                _number(timing.get("cpu_ms")),
                _number(timing.get("map_ms")),
                str(timing.get("chunk", "")),
                _number(values["flops"] / 1e9),
                _number(values["bytes"] / 1e6),
                _number(None if peak is None else peak / 1e6),
                "" if values["error"] is None else f"{values['error']:.0e}",
                remark if row["status"] == "done" else f"{row['status']}: {remark}",
            ]
        )
    return Table(f"Speed, {name}", head, lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
