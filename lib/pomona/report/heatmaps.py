"""Heat maps on one scale of colours, as PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomona.report.canvas import drawable, text_width
from pomona.report.colour import MIDDLE, luminance
from pomona.report.frame import SMALL, array, figure_of, put_title, say_empty
from pomona.report.ticks import brief, ends, numbers, ticks

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class HeatMap:
    """Values in rows, drawn from the top; None where there is none."""

    title: str
    values: Sequence[Sequence[float | None]]


def heat_maps(
    stem: Path,
    title: str,
    maps: Sequence[HeatMap],
    *,
    x_label: str,
    y_label: str,
    scale_label: str,
    columns: int = 3,
) -> None:
    """Write `stem`.png and `stem`.svg: `maps` in a grid of `columns`, all on one scale of colours.

    Rows and columns are numbered from 0. Cells of small maps also have their number.

    Raises:
        OutputError: a file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    grids = [_grid(heat.values) for heat in maps]
    known = [float(value) for grid in grids for value in grid.ravel() if not math.isnan(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    low = 0.0 if 0 < low < high / 4 else low
    darkest, lightest = (low, high) if high > low else ends([low], log=False)
    scale = Normalize(darkest, lightest)
    colours = colormaps["viridis"]
    rows, wide = (max((grid.shape[axis] for grid in grids), default=1) for axis in (0, 1))
    annotated = rows <= 16 and wide <= 12
    box = _box(rows, wide, annotated)
    across = max(1, min(columns, len(maps)))
    down = max(1, math.ceil(len(maps) / across))
    absent = any(math.isnan(value) for grid in grids for value in grid.ravel())
    size = (across * (box[0] + 0.75) + 1.0, down * (box[1] + 0.85))
    with figure_of(stem, title, size, (), "hatched: no value" if absent else None) as figure:
        every = [figure.add_subplot(down, across, place + 1) for place in range(len(maps))]
        for place, (axes, heat, grid) in enumerate(zip(every, maps, grids, strict=True)):
            _draw_map(figure, axes, grid, scale, colours, annotated, box)
            put_title(figure, axes, heat.title, box[0], 0)
            if place % across == 0:
                axes.set_ylabel(drawable(y_label))
            if place + across >= len(maps):
                axes.set_xlabel(drawable(x_label))
        if known:
            bar = figure.colorbar(ScalarMappable(scale, colours), ax=every, aspect=18 * down, fraction=0.08, pad=0.02)
            bar.solids.set(rasterized=False, edgecolor="face")  # shapes, not a picture, and no seams between them
            bar.outline.set_visible(False)
            bar.set_label(drawable(scale_label))
            places = ticks(low, high, [], 6, log=False) if high > low else [low]
            bar.set_ticks(places, labels=numbers(places))
        if not maps:
            say_empty(figure.add_subplot(), "nothing to show")


def _grid(values: Sequence[Sequence[float | None]]) -> NDArray[Any]:
    """`values` as a matrix, NaN where there is none, and at the end of short rows."""
    import numpy as np

    grid = np.full((len(values), max((len(row) for row in values), default=0)), np.nan)
    for place, row in enumerate(values):
        grid[place, : len(row)] = array(row)
    return grid


def _box(rows: int, wide: int, annotated: bool) -> tuple[float, float]:
    """Inches of one map."""
    cell = (0.44, 0.27) if annotated else (0.24, 0.115)
    return min(6.0, max(1.6, wide * cell[0])), min(5.0, max(1.1, rows * cell[1]))


def _draw_map(
    figure: Any, axes: Any, grid: NDArray[Any], scale: Any, colours: Any, annotated: bool, box: tuple[float, float]
) -> None:
    import numpy as np

    rows, wide = grid.shape
    if not grid.size:
        say_empty(axes, "no values")
        return
    axes.patch.set(facecolor="#EDEFF1", hatch="////", edgecolor="#A9AFB6", linewidth=0)
    edges = {"edgecolor": "white", "linewidth": 0.5} if rows * wide <= 1_000 else {"edgecolor": "face", "linewidth": 0}
    axes.pcolormesh(np.ma.masked_invalid(grid), cmap=colours, norm=scale, **edges)
    axes.set_ylim(rows, 0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    for count, room, place in ((wide, box[0] / 0.27, axes.set_xticks), (rows, box[1] / 0.2, axes.set_yticks)):
        step = next(step for step in _steps() if count / step <= room)
        place([n + 0.5 for n in range(0, count, step)], [f"{n:,}" for n in range(0, count, step)])
    axes.tick_params(labelsize=SMALL)
    if annotated:
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                ink = "white" if luminance(colours(scale(value))) < MIDDLE else "black"
                said = brief(float(value))
                size = min(SMALL - 0.5, (SMALL - 0.5) * (box[0] / wide - 0.05) / text_width(figure, said, SMALL))
                axes.text(column + 0.5, row + 0.5, said, ha="center", va="center", fontsize=size, color=ink)


def _steps() -> Iterator[int]:
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10
