"""Plots that are legible in grey, to colour-blind readers, and the same bytes for the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomona.report.canvas import STYLE, canvas, save_png

if TYPE_CHECKING:
    from numpy.typing import NDArray

# From the Okabe-Ito palette, which keeps its differences under every common colour blindness.
KEPT, DROPPED, MARK = "#0072B2", "#C9CDD2", "#D55E00"


def ratings_plot(
    path: Path,
    title: str,
    ratings: NDArray[Any],
    kept: NDArray[Any],
    *,
    threshold: float | None,
    scale: tuple[float, float],
) -> None:
    """How many records have each rating, kept and dropped stacked, with the threshold.

    Ratings in half points get a bar each; others are counted in steps of a fiftieth of the scale.
    """
    import numpy as np

    low, high = scale
    discrete = bool(np.all(ratings * 2 == np.round(ratings * 2))) and high - low <= 20
    if discrete:
        step = 0.5
        edges = np.arange(low - step / 2, high + step, step)
    else:
        step = (high - low) / 50
        edges = np.linspace(low, high, 51)
    line = None if threshold is None else threshold - (step / 2 if discrete else 0)
    label = None if threshold is None else f"threshold {threshold:g}"
    gap = 0.12 if discrete else 0.0
    _stacked(path, title, "rating", ratings, kept, edges, gap=gap, line=line, line_label=label, numbered=discrete)


def ifd_plot(path: Path, title: str, ifd: NDArray[Any], kept: NDArray[Any]) -> None:
    """The distribution of IFD, kept and dropped stacked, with the line at 1 above which an instruction only misleads.

    The axis ends at the 99th percentile or a little above 1; what lies beyond is counted in the last bar.
    """
    import numpy as np

    end = max(1.2, float(np.ceil(np.quantile(ifd, 0.99) * 10) / 10)) if len(ifd) else 1.2
    beyond = int((ifd > end).sum())
    name = "IFD" if not beyond else f"IFD   (last bar: with {beyond:,} above {end:g})"
    edges = np.linspace(0, end, round(end / (0.05 if end <= 3 else end / 50)) + 1)
    label = "1: misaligned above"
    _stacked(path, title, name, np.minimum(ifd, end), kept, edges, gap=0, line=1, line_label=label, numbered=False)


def _stacked(
    path: Path,
    title: str,
    label: str,
    values: NDArray[Any],
    kept: NDArray[Any],
    edges: NDArray[Any],
    *,
    gap: float,
    line: float | None,
    line_label: str | None,
    numbered: bool,
) -> None:
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    below, _ = np.histogram(values[~kept], edges)
    above, _ = np.histogram(values[kept], edges)
    centres, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges) * (1 - gap)
    with rc_context(STYLE):
        figure = canvas(7.5, 3.6)
        axes = figure.add_subplot()
        edge = {"edgecolor": "white", "linewidth": 0.4}
        axes.bar(centres, below, widths, color=DROPPED, label=f"dropped  {int((~kept).sum()):,}", **edge)
        axes.bar(centres, above, widths, bottom=below, color=KEPT, label=f"kept  {int(kept.sum()):,}", **edge)
        if numbered:  # a bar of eleven beside one of thirty thousand is invisible, its number is not
            for x, n in zip(centres, below + above, strict=True):
                if n:
                    axes.annotate(f"{n:,}", (x, n), (0, 3), textcoords="offset points", ha="center", fontsize=9)
        if line is not None:
            axes.axvline(line, color=MARK, linewidth=1.6, linestyle=(0, (5, 2)), label=line_label)
        axes.set_xlim(edges[0], edges[-1])
        axes.margins(y=0.1)
        axes.set_ylim(0, max(1.0, float((below + above).max(initial=0)) * 1.12))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.grid(axis="y")
        axes.spines[["left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)
        axes.set_ylabel("records")
        axes.set_title(title)
        named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        order = sorted(named, key=lambda name: ("kept" not in name, "dropped" not in name))
        axes.legend(
            [named[name] for name in order], order, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.4
        )
        save_png(figure, path)
