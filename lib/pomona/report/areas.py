"""Shares that make up a whole, stacked over time and named where they end, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pomona.report.canvas import INK, STYLE, broken, canvas, drawable, text_width
from pomona.report.charts import Series
from pomona.report.frame import COLOURS, SMALL, THEORY, array, figure_of, say_empty
from pomona.report.ticks import numbers, ticks

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WIDE, _HIGH, _LINES = 5.6, 3.0, 0.9  # inches of the axes, and of those of the lines above
_REACH = 0.2  # inches from where something ends to its name
_ROW = 0.19  # inches from one name to the next
_NAMED = 8
_ROUNDING = 1e-3  # that shares may be beyond 1 together
_REST = "#B4B9BF"


def areas(
    stem: Path,
    title: str,
    x: Sequence[float],
    layers: Sequence[tuple[str, Sequence[float | None]]],
    *,
    x_label: str,
    y_label: str,
    lines: Sequence[Series] = (),
    lines_label: str = "",
    order: Sequence[str] | None = None,
) -> None:
    """Write `stem`.png and `stem`.svg: `layers`, shares of 1 by name, stacked.

    Each is named beside its end, with its last share, so that no colour has to be told from another. Where one is
    absent or negative, or all are more than 1 together, there is a gap.

    Args:
        lines: shares over the same x, drawn above, without their intervals.
        order: the layers to name, from the lowest up, whose colours follow from their places; the rest are one area on
            top of them. By default `leading(layers)`.

    Raises:
        OutputError: a file cannot be written.
        ValueError: a layer has more or fewer values than `x`, or there is none of a name in `order`.
    """
    places, bands = _stacked(x, layers, leading(layers) if order is None else order)
    names = [f"{drawable(band.name, 32)}  {_percent(band.last)}" for band in bands]
    above = [drawable(line.label, 32) for line in lines]
    ruler = canvas(1, 1)
    beside = max((text_width(ruler, text, SMALL) for text in (*names, *above)), default=0.0)
    size = (_WIDE + beside + _REACH + 0.75, _HIGH + 0.6 + (_LINES + 0.25 if lines else 0))
    with figure_of(stem, title, size, (), description="; ".join(reversed(names))) as figure:
        grid = figure.add_gridspec(2 if lines else 1, 1, height_ratios=[_LINES, _HIGH] if lines else None)
        axes = figure.add_subplot(grid[-1])
        _prepare(figure, axes, places, y_label, _HIGH)
        axes.set_xlabel(broken(figure, drawable(x_label), _WIDE, STYLE["font.size"]))
        for band in bands:
            wide, low, high = _widened(places, band.low, band.high)
            axes.fill_between(wide, low, high, facecolor=band.colour, edgecolor="white", linewidth=0.7, clip_on=False)
        _name(
            axes, [(band.middle, name, {"color": band.colour}) for band, name in zip(bands, names, strict=True)], _HIGH
        )
        if not bands:
            say_empty(axes, "no values")
        if lines:
            upper = figure.add_subplot(grid[0])
            _prepare(figure, upper, places, lines_label, _LINES)
            upper.tick_params(axis="x", labelbottom=False)
            _draw_lines(upper, lines, above)


def leading(layers: Sequence[tuple[str, Sequence[float | None]]]) -> list[str]:
    """The names of the eight layers with the largest areas, or of all of nine or fewer, largest at the end first."""
    import numpy as np

    if not layers:
        return []
    names, shares = [name for name, _ in layers], _shares(layers)
    known = shares[:, ~np.isnan(shares).any(axis=0)]
    largest = np.argsort(-known.sum(axis=1), kind="stable")[: _NAMED if len(names) > _NAMED + 1 else None]
    return [names[place] for place in sorted(largest, key=lambda place: (-known[place, -1:].sum(), place))]


def _shares(layers: Sequence[tuple[str, Sequence[float | None]]]) -> NDArray[Any]:
    """(layers, places), NaN wherever they have no place in the stack, as the share of one is none."""
    import numpy as np

    shares = np.array([array(values) for _, values in layers])
    shares[:, ~(np.all(shares >= 0, axis=0) & (shares.sum(axis=0) <= 1 + _ROUNDING))] = np.nan
    return shares


class _Band(NamedTuple):
    """One area, between its edges `low` and `high` in the stack.

    Attributes:
        last, middle: its last share, and where its middle is there.
    """

    name: str
    low: NDArray[Any]
    high: NDArray[Any]
    colour: str
    last: float
    middle: float


def _stacked(
    x: Sequence[float], layers: Sequence[tuple[str, Sequence[float | None]]], order: Sequence[str]
) -> tuple[NDArray[Any], list[_Band]]:
    """Places on x in order, and the bands over them from the lowest up."""
    import numpy as np

    for name, values in layers:
        if len(values) != len(x):
            raise ValueError(f"{len(values)} values of {name!r} over {len(x)} places")
    places = array(x)
    along = np.argsort(places, kind="stable")[: int(np.sum(~np.isnan(places)))]
    places = places[along]
    if not layers:
        return places, []
    names, shares = [name for name, _ in layers], _shares(layers)[:, along]
    known = np.flatnonzero(~np.isnan(shares).any(axis=0))
    if not len(known):
        return places, []
    rows = [(name, shares[names.index(name)], _colour(place)) for place, name in enumerate(order)]
    if rest := [place for place, name in enumerate(names) if name not in order]:
        rows.append((f"{len(rest)} other{'s' * (len(rest) > 1)}", shares[rest].sum(axis=0), _REST))
    edges = np.cumsum([np.zeros(len(places)), *(values for _, values, _ in rows)], axis=0)
    bands = []
    for (name, values, colour), low, high in zip(rows, edges, edges[1:], strict=False):
        middle = (low[known[-1]] + high[known[-1]]) / 2
        bands.append(_Band(name, low, high, colour, float(values[known[-1]]), float(middle)))
    return places, bands


def _colour(place: int) -> str:
    """Fills without black, which would outshout the rest; paler from the second round on."""
    from matplotlib.colors import to_hex, to_rgb

    lap, at = divmod(place, len(COLOURS) - 1)
    first = COLOURS[1 + (at + 1) % (len(COLOURS) - 1)]
    return to_hex([1 - (1 - channel) * 0.5**lap for channel in to_rgb(first)])


def _widened(places: NDArray[Any], *values: NDArray[Any]) -> list[NDArray[Any]]:
    """`places` and what is there; a single one reaches half a step to either side."""
    import numpy as np

    if len(places) != 1:
        return [places, *values]
    return [places + np.array([-0.5, 0.5]), *(np.repeat(each, 2) for each in values)]


def _prepare(figure: Any, axes: Any, places: NDArray[Any], label: str, high: float) -> None:
    """Axes of shares, `high` inches high."""
    import numpy as np

    span = _widened(places)[0] if len(places) else np.array([0.0, 1.0])
    low, end = (float(side) for side in (span[0], span[-1]))
    end = end if end > low else low + 1
    axes.set(xlim=(low, end), ylim=(0, 1))
    at = list(places) if len(places) == 1 else ticks(low, end, list(map(float, places)), 8, log=False)
    axes.set_xticks(at, numbers(at))
    shares = [0.0, 0.5, 1.0] if high < 2 else [0.0, 0.25, 0.5, 0.75, 1.0]
    axes.set_yticks(shares, [_percent(share) for share in shares])
    axes.set_ylabel(broken(figure, drawable(label), high + 0.3, STYLE["font.size"]))
    axes.grid(axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _draw_lines(axes: Any, lines: Sequence[Series], names: Sequence[str]) -> None:
    """Draw `lines` with their `names` beside them."""
    import numpy as np

    ended = []
    for line, name in zip(lines, names, strict=True):
        x, y = _widened(array(line.x), array(line.y))
        y = np.where((y >= 0) & (y <= 1 + _ROUNDING), y, np.nan)
        style = {"linestyle": THEORY, "linewidth": 1.2} if line.theory else {"linewidth": 1.8}
        axes.plot(x, y, color=INK, clip_on=False, **style)
        known = np.flatnonzero(~np.isnan(y))
        if len(known):
            ended.append((float(y[known[-1]]), name, {"color": INK, **style}))
    _name(axes, sorted(ended, key=lambda end: end[0]), _LINES)


def _name(axes: Any, ended: Sequence[tuple[float, str, dict[str, Any]]], high: float) -> None:
    """Name beside axes of `high` inches what ends at which share, in that order from below, with a line to it."""
    tops = apart([share * high for share, _, _ in ended], _ROW, high)
    for (share, name, style), top in zip(ended, tops, strict=True):
        ways = [1 + part * _REACH / _WIDE for part in (0.0, 0.35, 0.85, 1.0)]
        look = {"linewidth": 1.4, **style}
        axes.plot(ways[:3], [share, share, top / high], transform=axes.transAxes, clip_on=False, **look)
        axes.text(ways[3], top / high, name, transform=axes.transAxes, va="center", fontsize=SMALL, color=INK)


def apart(wanted: Sequence[float], least: float, room: float) -> list[float]:
    """Places from 0 to `room`, `least` apart, as near to `wanted`, which are in order, as that allows.

    Least squares: the isotonic regression of wanted[i] - i least, by pooling adjacent violators. Where there is not
    room for all they reach beyond it.
    """
    pools: list[tuple[float, int]] = []  # mean of what was pooled, and how many
    for place, value in enumerate(wanted):
        mean, count = value - place * least, 1
        while pools and pools[-1][0] > mean:
            before, more = pools.pop()
            mean, count = (mean * count + before * more) / (count + more), count + more
        pools.append((mean, count))
    free = max(0.0, room - (len(wanted) - 1) * least)
    flat = [min(max(mean, 0.0), free) for mean, count in pools for _ in range(count)]
    return [value + place * least for place, value in enumerate(flat)]


def _percent(share: float) -> str:
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"
