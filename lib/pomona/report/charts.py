"""Curves in panels, as PNG and SVG: legible in grey print and to colour-blind readers, whatever the text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pomona.report.canvas import QUIET, STYLE, broken, drawable, text_width
from pomona.report.frame import SMALL, THEORY, Look, array, figure_of, look, put_above, put_title, say_empty
from pomona.report.ticks import REACH, ends, numbers, ticks

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PANEL = (3.5, 2.85)  # inches, with its labels


@dataclass(frozen=True)
class Series:
    """One line of a panel; the same label has the same colour, mark and dashes in every panel.

    Attributes:
        low: with `high`, an interval around each point: a band where there are more than two, bars otherwise.
        theory: drawn as a thin dashed line without marks, in the colour of the series of the same label.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    theory: bool = False


@dataclass(frozen=True)
class Panel:
    """Axes with their series.

    Attributes:
        y_range: ends of the y axis; by default what the series need.
        verticals: (x, label) of dashed lines.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    y_range: tuple[float, float] | None = None
    verticals: Sequence[tuple[float, str]] = ()


def curves(stem: Path, title: str, panels: Sequence[Panel], *, columns: int = 3) -> None:
    """Write `stem`.png and `stem`.svg: `panels` in a grid of `columns`, with one legend beside it.

    Raises:
        OutputError: a file cannot be written.
    """
    labels = list(dict.fromkeys(series.label for panel in panels for series in panel.series))
    looks = {label: look(place) for place, label in enumerate(labels)}
    across = max(1, min(columns, len(panels)))
    down = max(1, math.ceil(len(panels) / across))
    with figure_of(stem, title, (across * _PANEL[0], down * _PANEL[1]), _entries(looks, panels)) as figure:
        every = [figure.add_subplot(down, across, place + 1) for place in range(len(panels))]
        rows = [_draw_panel(figure, axes, panel, looks) for axes, panel in zip(every, panels, strict=True)]
        for place, (axes, panel) in enumerate(zip(every, panels, strict=True)):
            beside = place - place % across
            put_title(figure, axes, panel.title, _PANEL[0] - 0.75, max(rows[beside : beside + across]))
        if not panels:
            say_empty(figure.add_subplot(), "nothing to show")


class _Drawn(NamedTuple):
    """A series as arrays in the order of x; NaN where a point cannot be shown."""

    series: Series
    x: NDArray[Any]
    y: NDArray[Any]
    low: NDArray[Any]
    high: NDArray[Any]
    hidden: int  # points at or below 0 on a log axis
    absent: int  # points without a number


def _drawn(series: Series, panel: Panel) -> _Drawn:
    import numpy as np

    x, y = array(series.x), array(series.y)
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    low, high = (np.full_like(y, np.nan) if side is None else array(side)[order] for side in (series.low, series.high))
    absent = np.isnan(x) | np.isnan(y)
    hidden = ~absent & ((panel.log_x & ~(x >= 1 / REACH)) | (panel.log_y & ~(y >= 1 / REACH)))
    y = np.where(absent | hidden, np.nan, y)
    known = ~np.isnan(low) & ~np.isnan(high) & ~np.isnan(y)
    low, high = (np.where(known, side, np.nan) for side in (low, high))
    at = ~np.isnan(x)  # a gap in y breaks the line; one in x has no place
    if panel.log_x:
        at &= x >= 1 / REACH
    return _Drawn(series, x[at], y[at], low[at], high[at], int(hidden.sum()), int(absent.sum()))


def _draw_panel(figure: Any, axes: Any, panel: Panel, looks: dict[str, Look]) -> int:
    """Draw all but the title; returns how many rows of small text stand above the axes."""
    lines = [_drawn(series, panel) for series in panel.series]
    verticals = [(x, label) for x, label in panel.verticals if abs(x) <= REACH and (x >= 1 / REACH or not panel.log_x)]
    xs = [float(x) for line in lines for x, y in zip(line.x, line.y, strict=True) if not math.isnan(y)]
    shown = [float(y) for line in lines for side in (line.y, line.low, line.high) for y in side if not math.isnan(y)]
    if panel.log_y:
        shown = [y for y in shown if y >= 1 / REACH]
    x_ends = ends([*xs, *(x for x, _ in verticals)], log=panel.log_x)
    wanted = [y for y in panel.y_range or () if not panel.log_y or y >= 1 / REACH]
    y_ends = ends(wanted or shown, log=panel.log_y)
    axes.set(xscale="log" if panel.log_x else "linear", yscale="log" if panel.log_y else "linear")
    axes.set(xlim=x_ends, ylim=y_ends)
    _number_axes(figure, axes, panel, xs, x_ends, y_ends)
    axes.set_xlabel(broken(figure, drawable(panel.x_label), _PANEL[0] - 0.9, STYLE["font.size"]))
    axes.set_ylabel(broken(figure, drawable(panel.y_label), _PANEL[1] - 0.9, STYLE["font.size"]))
    axes.grid(axis="y")
    foreseen = {line.series.label for line in lines if line.series.theory}
    for place, line in enumerate(lines):
        share = place / max(1, len(lines) - 1)
        _draw_line(axes, line, looks[line.series.label], place, share, y_ends[0], line.series.label in foreseen)
    if not xs:
        say_empty(axes, "no points")
    rows = _mark_verticals(figure, axes, verticals, x_ends, log=panel.log_x)
    said = _left_out(lines)
    if said:
        put_above(axes, said, rows)
    return rows + bool(said)


def _number_axes(
    figure: Any,
    axes: Any,
    panel: Panel,
    xs: Sequence[float],
    x_ends: tuple[float, float],
    y_ends: tuple[float, float],
) -> None:
    most, room = 6, _PANEL[0] - 0.9

    def numbered() -> tuple[list[float], list[str]]:
        places = ticks(*x_ends, xs, most, log=panel.log_x)
        return places, numbers(places)

    places, said = numbered()
    while most > 2 and sum(text_width(figure, text, STYLE["font.size"]) + 0.12 for text in said) > room:
        most -= 1
        places, said = numbered()
    axes.set_xticks(places, said)
    between = sorted(set(xs) - set(places))
    between = between if len(between) <= 24 else []
    axes.set_xticks(between, [""] * len(between), minor=True)
    places = ticks(*y_ends, [], 5, log=panel.log_y)
    axes.set_yticks(places, numbers(places))
    axes.set_yticks([], minor=True)


def _draw_line(axes: Any, line: _Drawn, look: Look, place: int, share: float, floor: float, foreseen: bool) -> None:
    """Draw `line`, paler where theory lies over it; `share` of those before it are drawn already."""
    import numpy as np

    count = int(np.sum(~np.isnan(line.y)))
    if line.series.theory:
        lone = {"marker": "_", "markersize": 9} if count == 1 else {}
        axes.plot(line.x, line.y, color=look.colour, linestyle=THEORY, linewidth=1.2, zorder=5, **lone)
        return
    # Of lines that coincide the later are thinner and have smaller marks, so that the earlier still show around them.
    pale = 0.35 if foreseen else 1.0
    axes.plot(
        line.x, line.y, color=look.colour, linestyle=look.dashes, linewidth=2.1 - 0.9 * share, alpha=pale,
        zorder=3 + place / 1_000,
    )  # fmt: skip
    every = None if len(line.x) <= 16 else (place % 4, math.ceil(len(line.x) / 12))
    size = 6.6 - 2.6 * share
    axes.plot(line.x, line.y, linestyle="", markevery=every, zorder=4 + place / 1_000, **look.mark(size))
    if np.all(np.isnan(line.low)):
        return
    low = np.where(line.low < floor, floor, line.low)
    if count > 2:
        axes.fill_between(line.x, low, line.high, color=look.colour, alpha=0.13, linewidth=0, zorder=1.5)
    else:
        axes.vlines(line.x, low, line.high, color=look.colour, linewidth=1.2, zorder=2.9)


def _mark_verticals(
    figure: Any, axes: Any, verticals: Sequence[tuple[float, str]], span: tuple[float, float], *, log: bool
) -> int:
    """Draw the lines, with their labels in as many rows above the axes as keep them apart; returns how many."""
    low, high = (math.log10(end) if log else end for end in span)
    wide = _PANEL[0] - 0.9
    taken: list[float] = []  # where each row ends, in inches
    for x, label in sorted(verticals):
        place = ((math.log10(x) if log else x) - low) / (high - low) * wide
        said = drawable(label, 40)
        room = text_width(figure, said, SMALL - 1)
        left = min(max(0.0, place - room / 2), max(0.0, wide - room))
        row = next((row for row, end in enumerate(taken) if end < left), len(taken))
        taken[row : row + 1] = [left + room + 0.08]
        axes.axvline(x, color=QUIET, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1.8)
        put_above(axes, said, row, left / wide)
    return len(taken)


def _left_out(lines: Sequence[_Drawn]) -> str:
    hidden, absent = sum(line.hidden for line in lines), sum(line.absent for line in lines)
    said = [f"{hidden:,} at or below 0"] * bool(hidden) + [f"{absent:,} without a value"] * bool(absent)
    return f"left out: {', '.join(said)}" if said else ""


def _entries(looks: dict[str, Look], panels: Sequence[Panel]) -> list[tuple[Any, str]]:
    """The legend: (handle, label); one line stands for all theory."""
    from matplotlib.lines import Line2D

    measured = {series.label for panel in panels for series in panel.series if not series.theory}
    found: list[tuple[Any, str]] = []
    for label, style in looks.items():
        if label in measured:
            shape = {"linestyle": style.dashes, "linewidth": 1.7, **style.mark(6)}
        else:
            shape = {"linestyle": THEORY, "linewidth": 1.0}
        found.append((Line2D([], [], color=style.colour, **shape), label))
    if any(series.theory and series.label in measured for panel in panels for series in panel.series):
        found.append((Line2D([], [], color=QUIET, linestyle=THEORY, linewidth=1.0), "theory, in the same colour"))
    return found
