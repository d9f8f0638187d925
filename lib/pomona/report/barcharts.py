"""Grouped bars, as PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pomona.report.canvas import INK, QUIET, STYLE, broken, canvas, drawable, text_width
from pomona.report.frame import SMALL, Look, array, figure_of, look, say_empty
from pomona.report.ticks import REACH, brief, ends, numbers, ticks

_FIRST_BAR = 2  # a large area of black would outshout the rest


def bars(
    stem: Path,
    title: str,
    groups: Sequence[str],
    series: Sequence[tuple[str, Sequence[float | None]]],
    *,
    y_label: str,
    log_y: bool = False,
) -> None:
    """Write `stem`.png and `stem`.svg: for each of `groups` a bar of each of `series`, a dash where there is no value.

    Raises:
        OutputError: a file cannot be written.
    """
    from matplotlib.patches import Patch

    values = [array(heights)[: len(groups)] for _, heights in series]
    shown = [float(v) for heights in values for v in heights if not math.isnan(v) and (v >= 1 / REACH or not log_y)]
    low, high = _bar_ends(shown, log=log_y)
    looks = _bar_looks(len(series))
    entries = [
        (Patch(facecolor=style.colour, hatch=style.hatch, edgecolor="white", linewidth=0), label)
        for style, (label, _) in zip(looks, series, strict=True)
    ]
    names = [drawable(group, 40) for group in groups]
    wide, aslant = _room_for(names, len(series))
    absent = any(bool(math.isnan(v)) for heights in values for v in heights)
    hidden = sum(int((heights < 1 / REACH).sum()) for heights in values) if log_y else 0
    remarks = ["–: no value"] * absent + [f"bars left out: {hidden:,} at or below 0"] * bool(hidden)
    with figure_of(stem, title, (wide, 3.5), entries if len(series) > 1 else (), "; ".join(remarks)) as figure:
        axes = figure.add_subplot()
        axes.set(yscale="log" if log_y else "linear", ylim=(low, high), xlim=(-0.6, max(1, len(groups)) - 0.4))
        thick = 0.8 / max(1, len(series))
        inches = thick * (wide - 0.9) / max(1, len(groups))
        numbered = all(text_width(figure, brief(v), SMALL - 1) < inches + 0.04 for v in shown)
        for place, (style, heights) in enumerate(zip(looks, values, strict=True)):
            for group, height in enumerate(heights):
                x = group + (place - (len(series) - 1) / 2) * thick
                if math.isnan(height):
                    axes.annotate("–", (x, max(low, 0.0)), (0, 2), textcoords="offset points", ha="center", color=QUIET)
                elif height >= 1 / REACH or not log_y:
                    _draw_bar(axes, x, float(height), thick * 0.92, style, low if log_y else 0.0, numbered)
        if low < 0:
            axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xticks(range(len(names)), names, **aslant)
        places = ticks(low, high, [], 6, log=log_y)
        axes.set_yticks(places, numbers(places))
        axes.set_yticks([], minor=True)
        axes.set_ylabel(broken(figure, drawable(y_label), 2.6, STYLE["font.size"]))
        axes.grid(axis="y")
        axes.spines[["left"]].set_visible(False)
        axes.tick_params(length=0)
        if not shown:
            say_empty(axes, "no values")


def _bar_ends(heights: Sequence[float], *, log: bool) -> tuple[float, float]:
    """Ends of the axis: bars stand on 0, or on the power of ten below the least."""
    low, high = ends(heights if log else [*heights, 0.0], log=log)
    if log:
        return 10.0 ** math.floor(math.log10(low)), high * 10 ** (0.06 * (math.log10(high) - math.log10(low)))
    if not any(heights):
        return 0.0, 1.0
    return (low if min(heights) < 0 else 0.0), (high if max(heights) > 0 else 0.0)


def _draw_bar(axes: Any, x: float, height: float, width: float, style: Look, floor: float, numbered: bool) -> None:
    axes.bar(
        x, height - floor, width, floor, color=style.colour, hatch=style.hatch, edgecolor="white", linewidth=0, zorder=2
    )
    if numbered:
        up = height >= 0
        axes.annotate(
            brief(height),
            (x, height),
            (0, 2 if up else -2),
            textcoords="offset points",
            ha="center",
            va="bottom" if up else "top",
            fontsize=SMALL - 1,
        )


def _bar_looks(count: int) -> list[Look]:
    if count == 1:
        return [look(_FIRST_BAR)._replace(hatch="")]
    return [look(place + _FIRST_BAR)._replace(hatch=look(place).hatch) for place in range(count)]


def _room_for(names: Sequence[str], series: int) -> tuple[float, dict[str, Any]]:
    """Inches for the bars of `names`, and how the names are set: aslant where they do not fit side by side."""
    ruler = canvas(1, 1)
    widest = max((text_width(ruler, name, STYLE["font.size"]) for name in names), default=0.0)
    group = max(0.5, 0.26 * series + 0.14)
    if max(group, widest + 0.15) * len(names) <= 9:
        return max(4.6, max(group, widest + 0.15) * len(names) + 0.9), {}
    return min(14.0, group * len(names) + 0.9), {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
