"""Heat maps on one scale of colours, as PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomona.report.canvas import canvas, drawable, text_width
from pomona.report.colour import MIDDLE, luminance
from pomona.report.frame import SMALL, array, figure_of, put_title, say_empty
from pomona.report.ticks import brief, ends, numbers, ticks

if TYPE_CHECKING:
    from numpy.typing import NDArray


_LONGEST = 24  # characters of a name
_APART = 0.08  # inches between names side by side
_SLANT = math.sin(math.radians(45))


@dataclass(frozen=True)
class HeatMap:
    """Values in rows, drawn from the top; None where there is none.

    Attributes:
        row_names, column_names: of all rows and columns; without them they are numbered from 0.
    """

    title: str
    values: Sequence[Sequence[float | None]]
    row_names: Sequence[str] | None = None
    column_names: Sequence[str] | None = None


def heat_maps(
    stem: Path,
    title: str,
    maps: Sequence[HeatMap],
    *,
    x_label: str,
    y_label: str,
    scale_label: str,
    columns: int = 3,
    signed: bool = False,
    span: tuple[float, float] | None = None,
) -> None:
    """Write `stem`.png and `stem`.svg: `maps` in a grid of `columns`, all on one scale of colours.

    Cells of small maps also have their number. Names of columns that are too long to stand side by side stand aslant;
    of many rows or columns, only some are named.

    Args:
        signed: the values are differences, and 0 is the middle of the scale.
        span: ends of the scale; by default what the values need.

    Raises:
        OutputError: a file cannot be written.
        ValueError: a map has more or fewer names than rows or columns.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    grids = [_grid(heat.values) for heat in maps]
    known = [float(value) for grid in grids for value in grid.ravel() if not math.isnan(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    low = 0.0 if 0 < low < high / 4 else low
    if signed:
        high = max(high, -low)
        low = -high
    low, high = span or (low, high)
    darkest, lightest = (low, high) if high > low else ends([low], log=False)
    scale = Normalize(darkest, lightest)
    colours = colormaps["RdBu_r" if signed else "viridis"]
    rows, wide = (max((grid.shape[axis] for grid in grids), default=1) for axis in (0, 1))
    annotated = rows <= 16 and wide <= 12
    box = _box(rows, wide, annotated, any(heat.row_names or heat.column_names for heat in maps))
    across = max(1, min(columns, len(maps)))
    down = max(1, math.ceil(len(maps) / across))
    absent = any(math.isnan(value) for grid in grids for value in grid.ravel())
    measure, cell = canvas(1, 1), box[0] / max(1, wide)
    named = [_Names.of(heat, grid.shape, measure, cell) for heat, grid in zip(maps, grids, strict=True)]
    rooms = [names.room(measure) for names in named]
    left, below = (max((room[side] for room in rooms), default=0.0) for side in (0, 1))
    size = (across * (box[0] + 0.75 + left) + 1.0, down * (box[1] + 0.85 + below))
    with figure_of(stem, title, size, (), "hatched: no value" if absent else None) as figure:
        every = [figure.add_subplot(down, across, place + 1) for place in range(len(maps))]
        for place, (axes, heat, grid, names) in enumerate(zip(every, maps, grids, named, strict=True)):
            _draw_map(figure, axes, grid, scale, colours, annotated, box)
            if grid.size:
                names.put(axes, box)
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


def _box(rows: int, wide: int, annotated: bool, named: bool) -> tuple[float, float]:
    """Inches of one map."""
    cell = (0.44, 0.27) if annotated else (0.36, 0.2) if named else (0.24, 0.115)
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
    if annotated:
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                ink = "white" if luminance(colours(scale(value))) < MIDDLE else "black"
                said = brief(float(value))
                size = min(SMALL - 0.5, (SMALL - 0.5) * (box[0] / wide - 0.05) / text_width(figure, said, SMALL))
                axes.text(column + 0.5, row + 0.5, said, ha="center", va="center", fontsize=size, color=ink)


@dataclass(frozen=True)
class _Names:
    """What stands beside the rows of a map, and below its columns."""

    rows: list[str]
    columns: list[str]
    aslant: bool

    @classmethod
    def of(cls, heat: HeatMap, shape: tuple[int, int], measure: Any, cell: float) -> _Names:
        """Names of `heat`, aslant where one of its columns' is wider than a cell."""
        found = []
        for names, count, what in zip((heat.row_names, heat.column_names), shape, ("rows", "columns"), strict=True):
            if names is not None and len(names) != count:
                raise ValueError(f"{len(names)} names of {count} {what}")
            found.append([f"{n:,}" for n in range(count)] if names is None else [drawable(n, _LONGEST) for n in names])
        widest = max((text_width(measure, name, SMALL) for name in found[1]), default=0.0)
        return cls(found[0], found[1], heat.column_names is not None and widest > cell - _APART)

    def room(self, measure: Any) -> tuple[float, float]:
        """Inches that they take beyond what a number would, to the left and below."""
        wide, high = (max((text_width(measure, n, SMALL) for n in names), default=0.0) for names in self._sides())
        return max(0.0, wide - 0.3), max(0.0, high * _SLANT - 0.1) if self.aslant else 0.0

    def put(self, axes: Any, box: tuple[float, float]) -> None:
        """Name as many as there is room for."""
        lines = (axes.set_yticks, box[1] / 0.2), (axes.set_xticks, box[0] / (0.19 if self.aslant else 0.27))
        for names, (place, most) in zip(self._sides(), lines, strict=True):
            step = next(step for step in _steps() if len(names) / step <= most)
            place([n + 0.5 for n in range(0, len(names), step)], names[::step])
        axes.tick_params(labelsize=SMALL)
        if self.aslant:
            for label in axes.get_xticklabels():
                label.set(rotation=45, rotation_mode="anchor", ha="right", va="center")

    def _sides(self) -> tuple[list[str], list[str]]:
        return self.rows, self.columns


def _steps() -> Iterator[int]:
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10
