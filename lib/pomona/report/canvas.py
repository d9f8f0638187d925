"""What every figure shares: one style, text that can be drawn, and files that are the same for the same numbers."""

from __future__ import annotations

import functools
import io
import re
from pathlib import Path
from typing import Any

from pomona.io.atomic import atomic_file
from pomona.report.text import one_line

INK, QUIET, RULE, GRID = "#333333", "#666B71", "#888888", "#E4E6E9"
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 14,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.dpi": 144,
    "savefig.dpi": 144,
    "text.parse_math": False,  # labels may hold text of users
    "svg.fonttype": "path",  # outlines: a reader without the font would set other widths, and labels would collide
    "svg.hashsalt": "pomona",  # otherwise the names of an SVG's parts are drawn anew each time
}
_DOCTYPE = re.compile(rb"<!DOCTYPE[^>]*>\s*")


def canvas(width: float, height: float) -> Any:
    """An empty figure of `width` by `height` inches; what is put on it arranges itself without overlap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Any, path: Path) -> None:
    """Write `figure` to `path`.

    Raises:
        OutputError: `path` cannot be written.
    """
    with atomic_file(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def save(figure: Any, stem: Path, title: str, description: str) -> None:
    """Write `figure` as `stem`.png and `stem`.svg; the SVG says `title` and `description` to those who cannot see it.

    Raises:
        OutputError: a file cannot be written.
    """
    save_png(figure, stem.with_name(f"{stem.name}.png"))
    drawn = io.BytesIO()
    silent = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(drawn, format="svg", metadata={**silent, "Title": title, "Description": description})
    with atomic_file(stem.with_name(f"{stem.name}.svg")) as file:
        # the document type is an address that some readers would fetch
        file.write(_DOCTYPE.sub(b"", drawn.getvalue(), count=1))


def drawable(text: str, room: int = 120) -> str:
    """`text` on one harmless line of at most `room` characters; what the font lacks becomes U+FFFD."""
    glyphs = _glyphs()
    return "".join(c if ord(c) in glyphs else "\ufffd" for c in one_line(text, room))


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    faces = [FontProperties(family=STYLE["font.family"], weight=weight) for weight in ("normal", "bold")]
    first, second = (get_font(findfont(face)).get_charmap() for face in faces)
    return frozenset(first) & frozenset(second)


def text_width(figure: Any, text: str, size: float, weight: str = "normal") -> float:
    """Inches that `text` takes in one line of `size` points."""
    from matplotlib.font_manager import FontProperties

    face = FontProperties(family=STYLE["font.family"], size=size, weight=weight)
    width, _, _ = figure.canvas.get_renderer().get_text_width_height_descent(text, face, False)
    return float(width) / float(figure.dpi)


def broken(figure: Any, text: str, inches: float, size: float, weight: str = "normal", lines: int = 2) -> str:
    """`text` in at most `lines` lines that are no wider than `inches`; what does not fit ends in an ellipsis."""

    def fits(said: str) -> bool:
        return text_width(figure, said, size, weight) <= inches

    shown: list[str] = [""]
    for word in text.split():
        said = f"{shown[-1]} {word}".strip()
        if fits(said) or not shown[-1]:
            shown[-1] = said
        else:
            shown.append(word)
    cut = len(shown) > lines
    shown = shown[:lines]
    if cut:
        shown[-1] += "…"
    for place, said in enumerate(shown):
        while len(said) > 1 and not fits(said):
            said = said.removesuffix("…")[:-1].rstrip() + "…"
        shown[place] = said
    return "\n".join(shown)
