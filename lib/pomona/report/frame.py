"""What charts share: how a series looks, the frame with its title and legend, small text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pomona.report.canvas import QUIET, STYLE, broken, canvas, drawable, save, text_width
from pomona.report.ticks import REACH

if TYPE_CHECKING:
    from numpy.typing import NDArray

SMALL = 9.0  # points


class Look(NamedTuple):
    """How a series is drawn. The first 28 differ in mark, filled or hollow, or in dashes, without their colour."""

    colour: str
    marker: str
    dashes: Any
    hollow: bool
    hatch: str

    def mark(self, size: float) -> dict[str, Any]:
        """Its mark, of `size` points, as matplotlib wants to be told."""
        return {
            "marker": self.marker,
            "markersize": size * _SIZES.get(self.marker, 1.0),
            "markerfacecolor": "white" if self.hollow else self.colour,
            "markeredgecolor": self.colour if self.hollow else "white",
            "markeredgewidth": 1.2 if self.hollow else 0.5,
        }


# Okabe-Ito without its yellow, which is lost on white, ordered so that neighbours differ in lightness too.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#56B4E9", "#D55E00", "#CC79A7")
_MARKERS = ("o", "s", "^", "D", "v", "X", "P", "p", "<", "d", ">", "h", "*", "8")
_SIZES = {"X": 1.25, "P": 1.3, "*": 1.5, "p": 1.15, "^": 1.1, "v": 1.1, "d": 1.15}  # to look as large as others
_DASHES = ("-", (0, (7, 1.5)), (0, (7, 1.5, 1.2, 1.5)), (0, (1.2, 1.2)))
THEORY = (0, (3.2, 2.2))
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxx", "----", "++")


def look(place: int) -> Look:
    """The look of the series that is `place`-th, from 0, to appear in a figure."""
    lap, colour = divmod(place, len(COLOURS))
    marker = _MARKERS[(place + lap // 2) % len(_MARKERS)]
    hatch = _HATCHES[(place + lap) % len(_HATCHES)]
    return Look(COLOURS[colour], marker, _DASHES[(place + lap) % len(_DASHES)], lap % 2 == 1, hatch)


@contextmanager
def figure_of(
    stem: Path,
    title: str,
    size: tuple[float, float],
    entries: Sequence[tuple[Any, str]],
    note: str | None = None,
    description: str | None = None,
) -> Iterator[Any]:
    """A figure whose plots have `size` inches, saved when the block ends; title above, legend at the right.

    Args:
        description: what the SVG says to those who cannot see it; by default the labels of the legend.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        named = [(handle, drawable(label, 32)) for handle, label in entries]
        figure = canvas(*size)
        high = size[1] + 0.55
        most = max(1, int((high - 0.6) / 0.235))  # entries in one column of the legend
        stacks = math.ceil(len(named) / most)
        widest = max((text_width(figure, label, STYLE["font.size"]) for _, label in named), default=0.0)
        wide = size[0] + stacks * (widest + 0.72)
        said = broken(figure, drawable(title, 200), size[0] - 0.5, 13, "bold", lines=3)
        figure.set_size_inches(wide, high + 0.22 * said.count("\n") + (0.25 if note else 0))
        figure.suptitle(said, x=0.12 / wide, ha="left", fontsize=13, fontweight="bold")
        yield figure
        if named:
            figure.legend(
                *zip(*named, strict=True),
                loc="outside right upper",
                ncols=stacks,
                handlelength=3.0,
                labelspacing=0.45,
                borderaxespad=0.6,
            )
        if note:
            figure.supxlabel(drawable(note, 200), x=0.12 / wide, ha="left", fontsize=SMALL, color=QUIET)
        save(figure, stem, drawable(title, 200), description or "; ".join(label for _, label in named))


def put_title(figure: Any, axes: Any, title: str, inches: float, rows: int) -> None:
    """Set the title above `rows` of small text."""
    axes.set_title(broken(figure, drawable(title), inches, 11, "bold"), fontsize=11, pad=8 + 12 * rows)


def put_above(axes: Any, said: str, row: int, share: float = 0.0) -> None:
    """Small text over the axes, in the `row`-th row from below, from `share` of their width."""
    axes.annotate(
        said, (share, 1), (0, 4 + 12 * row), xycoords="axes fraction", textcoords="offset points", va="bottom",
        fontsize=SMALL - 1, color=QUIET,
    )  # fmt: skip


def say_empty(axes: Any, said: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", va="center", color=QUIET)


def array(values: Sequence[float | None]) -> NDArray[Any]:
    import numpy as np

    found = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return np.where(np.abs(found) <= REACH, found, np.nan)
