"""How far each layer of a model is from what it was: bars of all of them, a table of the worst."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pomona.report.barcharts import bars
from pomona.report.sections import Table
from pomona.report.ticks import brief

WORST = 5

_SPREAD = 30  # largest over least: beyond, the least bars could not be seen on a linear axis
_NAMED = 30  # bars that have their names


def layer_errors(stem: Path, title: str, names: Sequence[str], errors: Sequence[float]) -> None:
    """Write `stem`.png and `stem`.svg: a bar for the relative L2 error of each layer.

    The axis is logarithmic where errors span decades; of many layers, only some are named.

    Raises:
        OutputError: a file cannot be written.
    """
    above = [error for error in errors if error > 0]
    spread = bool(above) and max(above) >= _SPREAD * min(above)
    every = -(-len(names) // _NAMED)
    shown = [name if place % every == 0 else "" for place, name in enumerate(names)]
    bars(stem, title, shown, [("error", errors)], y_label="relative L2 error", log_y=spread)


def worst_layers(names: Sequence[str], errors: Sequence[float]) -> Table:
    """The layers of largest error, `WORST` at most, worst first; layers of equal error in their own order."""
    ranked = sorted(zip(errors, names, strict=True), key=lambda pair: -pair[0])[:WORST]
    which = f"The {len(ranked)} worst of {len(names)} layers" if len(names) > len(ranked) else "All layers, worst first"
    said = f"{which}. Error: relative L2 distance of the hidden states."
    return Table(said, ["layer", "error"], [[name, brief(error)] for error, name in ranked])
