"""Values with their intervals, a row for each name, as PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomona.report.canvas import GRID, INK, QUIET, STYLE, broken, canvas, drawable, text_width
from pomona.report.frame import SMALL, Look, array, figure_of, look, say_empty
from pomona.report.ticks import ends, numbers, ticks

_WIDE = 5.2  # inches of the axes
_LONGEST = 28  # characters of a name


@dataclass(frozen=True)
class Dots:
    """A value for each row, None where there is none, each within its interval, if that is known."""

    label: str
    values: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


def dots(
    stem: Path,
    title: str,
    rows: Sequence[str],
    series: Sequence[Dots],
    *,
    x_label: str,
    beside: tuple[str, Sequence[str]] | None = None,
    note: str | None = None,
    first_look: int = 0,
) -> None:
    """Write `stem`.png and `stem`.svg: for each of `rows`, from the top, a dot of each of `series` with its interval.

    Args:
        beside: a heading, and what stands under it at the right of each row.
        note: small text below.
        first_look: place of the first series among those that other figures show with it, to look the same.

    Raises:
        OutputError: a file cannot be written.
        ValueError: there are more or fewer values, or texts beside them, than rows.
    """
    from matplotlib.lines import Line2D

    columns = [values for each in series for values in (each.values, each.low, each.high) if values is not None]
    for column in [*columns, *([beside[1]] if beside else [])]:
        if len(column) != len(rows):
            raise ValueError(f"{len(column)} values of {len(rows)} rows")
    shown = [float(v) for column in columns for v in array(column) if not math.isnan(v)]
    low, high = ends([*shown, 0.0], log=False)
    names = [drawable(name, _LONGEST) for name in rows]
    ruler = canvas(1, 1)
    left, right = (
        max((text_width(ruler, text, SMALL) for text in texts), default=0.0)
        for texts in (names, [drawable(text, 40) for text in (beside[0], *beside[1])] if beside else [])
    )
    row = 0.13 * len(series) + 0.12
    size = (_WIDE + left + right + 0.7, max(1, len(rows)) * row + 0.75)
    looks = [look(first_look + place) for place in range(len(series))]
    entries = [
        (Line2D([], [], color=style.colour, linewidth=1.4, **style.mark(6)), each.label)
        for style, each in zip(looks, series, strict=True)
    ]
    with figure_of(stem, title, size, entries, note) as figure:
        axes = figure.add_subplot()
        axes.set(xlim=(low, high), ylim=(max(1, len(rows)) - 0.5, -0.5))
        for edge in range(1, len(rows)):
            axes.axhline(edge - 0.5, color=GRID, linewidth=0.8, zorder=1)
        if shown:
            axes.axvline(0, color=INK, linewidth=0.9, zorder=2)
        for place, (style, each) in enumerate(zip(looks, series, strict=True)):
            _draw(axes, each, style, (place - (len(series) - 1) / 2) * 0.13 / row)
        axes.set_yticks(range(len(names)), names)
        places = ticks(low, high, [], 8, log=False)
        axes.set_xticks(places, numbers(places))
        axes.tick_params(length=0)
        axes.tick_params(axis="y", labelsize=SMALL)
        axes.set_xlabel(broken(figure, drawable(x_label), _WIDE, STYLE["font.size"]))
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        if beside:
            small = {"fontsize": SMALL, "color": QUIET, "xycoords": axes.get_yaxis_transform(), "va": "center"}
            for place, text in enumerate(beside[1]):
                axes.annotate(drawable(text, 40), (1, place), (8, 0), textcoords="offset points", **small)
            heading = {**small, "xycoords": "axes fraction", "va": "bottom"}
            axes.annotate(drawable(beside[0], 40), (1, 1), (8, 3), textcoords="offset points", **heading)
        if not shown:
            say_empty(axes, "no values")


def _draw(axes: Any, each: Dots, style: Look, off: float) -> None:
    """Draw a series `off` the middle of its rows."""
    values = array(each.values)
    y = [place + off for place in range(len(values))]
    if each.low is not None and each.high is not None:
        axes.hlines(y, array(each.low), array(each.high), color=style.colour, linewidth=1.6, zorder=3)
    axes.plot(values, y, linestyle="", zorder=4, **style.mark(5.6))
