"""What a run says, for people: the sections of `report.md`, and the end of a run on a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from pomona.report.text import columns, escape, fit, one_line, wrap

_PROSE = 2_000  # characters of a sentence or a list of them
_CELL = 300
_ROWS = 12  # of a table that a terminal shows
_LEAST = 6  # columns of words that have to be cut
_NAME = 18  # of what says what a row is about
# A figure, perhaps with a bound, a sign or a unit; so is a dash, where there is none.
_FIGURE = re.compile(r"[<>≤≥≈~]? ?[-+−±]?\.?\d.*|[-–—]?")


@dataclass(frozen=True)
class Table:
    """A table of the report; cells are text."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """What one part of a run says.

    Attributes:
        title: its heading.
        question: the question it answers.
        verdict: the answer, in plain sentences.
        notes: what a reader must know to believe it, such as where constants come from.
        figures: (stem of the file in figures/, caption).
    """

    title: str
    question: str
    verdict: Sequence[str]
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[tuple[str, str]] = field(default_factory=tuple)


def markdown(title: str, preamble: str, sections: Sequence[Section], about: Mapping[str, str]) -> str:
    """The text of report.md.

    Args:
        preamble: Markdown of ours that stands under the title.
        about: the run's settings, by name.
    """
    return "\n".join(_document(title, preamble, sections, about))


def _document(title: str, preamble: str, sections: Sequence[Section], about: Mapping[str, str]) -> Iterator[str]:
    yield f"# {_safe(title)}\n"
    yield f"{preamble}\n"
    for name, value in about.items():
        yield f"- {_safe(name, 60)}: {_safe(value, _CELL)}"
    if about:
        yield ""
    yield "## In short\n"
    for section in sections:
        verdict = _safe(" ".join(section.verdict[:2])) or "No verdict."
        yield f"- **{_heading(section)}.** {_safe(section.question)} {verdict}"
    yield "" if sections else "Nothing was run.\n"
    for section in sections:
        yield from _section(section)


def _section(section: Section) -> Iterator[str]:
    yield f"## {_heading(section)}\n"
    yield f"*{_safe(section.question)}*\n"
    for said in section.verdict:
        yield f"{_safe(said)}\n"
    for table in section.tables:
        yield from _table(table)
    for stem, caption in section.figures:
        path = f"figures/{quote(stem)}"
        yield f"![{_safe(caption, _CELL)}]({path}.svg)\n"
        yield f"{_safe(caption)} ([PNG]({path}.png))\n"
    if section.notes:
        yield "### Notes\n"
        for said in section.notes:
            yield f"- {_safe(said)}"
        yield ""


def _heading(section: Section) -> str:
    return _safe(section.title.capitalize(), 60)


def _safe(text: str, room: int = _PROSE) -> str:
    return escape(one_line(text, room))


def _table(table: Table) -> Iterator[str]:
    """A Markdown table under its caption, its columns as wide in the source as they need to be."""
    yield f"{_safe(table.caption)}\n"
    yield from table_lines(table.head, table.rows)
    yield ""


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table, columns of figures to the right; no text in it can become markup or end a cell."""
    table = Table("", head, rows)
    sides = _sides(table)
    cells = [[_safe(cell, _CELL) for cell in row] for row in _rectangle(table)]
    widths = [max(3, *(columns(row[place]) for row in cells)) for place in range(len(sides))]
    yield _line(cells[0], widths, sides)
    rules = ("-" * (width + 1) + (":" if side == "r" else "-") for width, side in zip(widths, sides, strict=True))
    yield f"|{'|'.join(rules)}|"
    for row in cells[1:]:
        yield _line(row, widths, sides)


def _line(row: Sequence[str], widths: Sequence[int], sides: str) -> str:
    return f"| {' | '.join(_padded(*cell) for cell in zip(row, widths, sides, strict=True))} |"


def _rectangle(table: Table) -> list[list[str]]:
    """The head and the rows, short ones filled up with empty cells."""
    wide = max(1, len(table.head), *(len(row) for row in table.rows)) if table.rows else max(1, len(table.head))
    return [[*row, *[""] * (wide - len(row))] for row in (table.head, *table.rows)]


def _sides(table: Table) -> str:
    """An r for each column of figures, an l for the others."""
    by_column = zip(*_rectangle(table)[1:], strict=True) if table.rows else ()
    found = "".join(
        "r" if any(cells) and all(_FIGURE.fullmatch(one_line(cell, _CELL)) for cell in cells) else "l"
        for cells in by_column
    )
    return found or "l" * len(_rectangle(table)[0])


def _padded(text: str, width: int, side: str) -> str:
    space = " " * (width - columns(text))
    return space + text if side == "r" else text + space


# --- a terminal ------------------------------------------------------------------------------------------------------


def terminal(sections: Sequence[Section], width: int = 80) -> list[str]:
    """What a person sees when the run ends, in lines of at most `width` columns, and 20 at least."""
    width = max(20, width)
    lines: list[str] = []
    for section in sections:
        lines += [""] * bool(lines) + wrap(f"{section.title.capitalize()}: {section.question}", width, "  ")
        lines += [line for said in section.verdict for line in wrap(said, width)]
        if section.tables:
            lines += ["", *_compact(section.tables[0], width)]
    return lines


def _compact(table: Table, width: int) -> Iterator[str]:
    """The table without its rules: words are cut to the width, figures never; columns that do not fit are counted."""
    yield from wrap(table.caption.partition(". ")[0], width)  # report.md explains every column
    cells = [[one_line(cell, 4 * width) for cell in row] for row in _rectangle(table)]
    shown, sides = cells[: _ROWS + 1], _sides(table)
    widths = [max(columns(row[place]) for row in shown) for place in range(len(sides))]
    figures = [max((columns(row[place]) for row in shown[1:]), default=0) for place in range(len(sides))]
    least = [max(_LEAST, size if side == "r" else 0) for size, side in zip(figures, sides, strict=True)]
    for place, title in enumerate(cells[0]):
        if place == 0 or title in ("kernel", "implementation"):
            least[place] = max(least[place], min(widths[place], _NAME, width // 3))
    kept = len(widths)
    while sum(widths[:kept]) + 2 * kept > width:
        spare = [size - floor for size, floor in zip(widths[:kept], least[:kept], strict=True)]
        if max(spare) > 0:
            widths[spare.index(max(spare))] -= 1
        elif kept > 1:
            kept -= 1
        else:
            widths[0] = width - 2
    for row in shown:
        fitted = (
            _padded(fit(cell, size) if columns(cell) > size else cell, size, side)
            for cell, size, side in zip(row[:kept], widths[:kept], sides[:kept], strict=True)
        )
        yield f"  {'  '.join(fitted)}".rstrip()
    left = [f"{len(cells) - len(shown):,} more rows"] * (len(cells) > len(shown))
    left += [f"{len(widths) - kept:,} more columns"] * (kept < len(widths))
    if left:
        yield fit(f"({' and '.join(left)} in report.md)", width)
