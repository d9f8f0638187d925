"""Small images in rows, in groups side by side, pixel by pixel, as PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomona.report.canvas import QUIET, STYLE, broken, canvas, drawable, save, text_width
from pomona.report.frame import SMALL

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DOTS = 144  # an inch; the PNG's pixels are the canvas's
_SIDE = 56, 112  # pixels that small images are enlarged to at least, and that large ones are reduced to at most
_GAP, _APART = 5, 24  # pixels between images, and between groups
_FRAME = "#B9BEC4"
_LONGEST = 18  # characters of a name


def strips(
    stem: Path, title: str, groups: Sequence[tuple[str, NDArray[Any]]], names: Sequence[str], *, note: str | None = None
) -> None:
    """Write `stem`.png and `stem`.svg: a row for each of `names`, and in it images of each of `groups`.

    Each pixel becomes a square of pixels of the same colour; of images larger than 112 pixels, squares of pixels
    become one of their mean colour.

    Args:
        groups: a title over uint8 (rows, images, channels, height, width), of 1 or 3 channels and all of one size.
        note: small text below.

    Raises:
        OutputError: a file cannot be written.
        ValueError: groups have other numbers of rows, or images of other sizes.
    """
    from matplotlib import rc_context

    shapes = {(images.shape[0], *images.shape[3:]) for _, images in groups}
    if shapes - {(len(names), *shape[1:]) for shape in [*shapes][:1]}:
        raise ValueError(f"images of {sorted(shapes)} (rows, height, width) beside {len(names)} names")
    with rc_context(STYLE):
        grids = [_tiled(images) for _, images in groups if images.size]
        heads = [text for text, images in groups if images.size]
        ruler = canvas(1, 1)
        shown = [drawable(name, _LONGEST) for name in names]
        left = 18 + math.ceil(_DOTS * max((text_width(ruler, name, SMALL) for name in shown), default=0.0)) + 14
        wide = left + sum(grid.shape[1] + _APART for grid in grids)
        wide = max(wide, 4 * _DOTS)
        high = max((grid.shape[0] for grid in grids), default=_DOTS)
        said = broken(ruler, drawable(title, 200), wide / _DOTS - 0.3, 13, "bold", lines=3)
        above = 62 + 32 * said.count("\n") + (38 if grids else 0)
        tall = above + high + (52 if note else 20)
        figure = canvas(wide / _DOTS, tall / _DOTS)
        figure.set_layout_engine("none")  # every pixel has its place
        figure.text(18 / wide, 1 - 16 / tall, said, fontsize=13, fontweight="bold", va="top")
        x = left
        for head, grid in zip(heads, grids, strict=True):
            rows, columns = grid.shape[:2]
            axes = figure.add_axes((x / wide, (tall - above - rows) / tall, columns / wide, rows / tall))
            axes.set_axis_off()
            axes.imshow(grid, interpolation="none", aspect="auto")
            fitting = broken(ruler, drawable(head, 60), (columns + _APART - 8) / _DOTS, SMALL, lines=1)
            figure.text(x / wide, 1 - (above - 9) / tall, fitting, fontsize=SMALL, color=QUIET, va="bottom")
            x += columns + _APART
        for place, name in enumerate(shown if grids else []):
            middle = above + high * (place + 0.5) / len(shown)
            figure.text((left - 14) / wide, 1 - middle / tall, name, fontsize=SMALL, ha="right", va="center")
        if not grids:
            figure.text(0.5, 0.5, "nothing to show", color=QUIET, ha="center")
        if note:
            figure.text(18 / wide, 14 / tall, drawable(note, 200), fontsize=SMALL, color=QUIET, va="bottom")
        save(figure, stem, drawable(title, 200), "; ".join([*map(drawable, heads), *shown]))


def _tiled(images: NDArray[Any]) -> NDArray[Any]:
    """`images` side by side, framed, as uint8 (height, width, 3)."""
    import numpy as np
    from matplotlib.colors import to_rgb

    scaled = np.stack([[_scaled(image) for image in row] for row in images])
    rows, columns, height, width, _ = scaled.shape
    frame = [round(255 * channel) for channel in to_rgb(_FRAME)]
    sheet = np.full((rows * (height + 2 + _GAP) - _GAP, columns * (width + 2 + _GAP) - _GAP, 3), 255, np.uint8)
    for row, column in np.ndindex(rows, columns):
        top, left = row * (height + 2 + _GAP), column * (width + 2 + _GAP)
        sheet[top : top + height + 2, left : left + width + 2] = frame
        sheet[top + 1 : top + 1 + height, left + 1 : left + 1 + width] = scaled[row, column]
    return sheet


def _scaled(image: NDArray[Any]) -> NDArray[Any]:
    """`image` (channels, height, width) as (height, width, 3), enlarged or reduced by a whole number."""
    import numpy as np

    pixels: NDArray[Any] = np.moveaxis(image, 0, 2)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    side = max(pixels.shape[:2])
    if side <= _SIDE[1]:
        times = max(1, round(_SIDE[0] / side))
        return pixels.repeat(times, axis=0).repeat(times, axis=1)
    step = math.ceil(side / _SIDE[1])
    height, width = (max(1, size // step) for size in pixels.shape[:2])
    whole = pixels[: height * step, : width * step].astype(np.float64)
    means = whole.reshape(height, step, width, step, 3).mean(axis=(1, 3))
    return np.asarray(np.rint(means), dtype=np.uint8)
