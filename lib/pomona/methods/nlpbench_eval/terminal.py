"""The result on a terminal: what a person wants to know when the run ends, in plain lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from pomona.methods.nlpbench_eval import findings
from pomona.methods.nlpbench_eval.arms import Arm, Comparison
from pomona.methods.nlpbench_eval.findings import Cell, Reading, Row, interval, share
from pomona.report.text import columns, fit, wrap

_NAME = 26  # columns of a row's name
_FIGURES = 45  # of n, two accuracies and their intervals
_STRIP = 12  # of the drawn interval, at least


def terminal_lines(
    arms: Sequence[Arm], comparisons: Sequence[Comparison], width: int = 80, parser: Reading = "lenient"
) -> list[str]:
    """Lines of at most `width` columns, and 20 at least; `parser` is the reading that comes first."""
    width = max(20, width)
    lines = wrap(f"NLPBench: {findings.heading(arms)}", width, "  ")
    for said in dict.fromkeys(findings.data(arm) for arm in arms):
        lines += wrap(said, width, "  ")
    lines += ["", *wrap(findings.verdict(arms, parser), width)]
    lines += ["", *(_one(arms[0], width, parser) if len(arms) == 1 else _several(arms, width, parser))]
    if comparisons:
        lines += ["", *_pairs(comparisons, width)]
    lines.append("")
    for said in findings.warnings(arms):
        lines += wrap(f"! {said}", width, "  ")
    for said in findings.power(arms):
        lines += wrap(said, width)
    return lines


def _one(arm: Arm, width: int, parser: Reading) -> Iterator[str]:
    yield _header(width, parser)
    for part, rows in groupby(findings.rows(arm.result), lambda row: row.part):
        if part == "Type and context":
            continue
        if part:
            yield ""
        for row in rows:
            yield _line(row, row.name, width, parser)
    yield ""
    answered, everything = (arm.result["accuracy"][parser][of] for of in ("answered", "all"))
    if everything["n"] != answered["n"]:
        yield from wrap(
            f"of all {everything['n']:,}, unanswered counted as wrong: {share(everything)} ({interval(everything)})",
            width,
        )
    used = [f"{name} {values[0]}" for part, name, values in findings.conduct([arm]) if part in ("Use", "Votes")]
    if used:
        yield from wrap("; ".join(used), width)


def _several(arms: Sequence[Arm], width: int, parser: Reading) -> Iterator[str]:
    yield _header(width, parser)
    table: dict[str, list[tuple[str, Row]]] = {}
    for name, of, lenient, strict in findings.denominators(arms):
        row = Row("", of, {"lenient": {"answered": lenient}, "strict": {"answered": strict}})
        table.setdefault(f"Of {of}", []).append((name, row))
    for arm in arms:
        for row in findings.rows(arm.result):
            if row.part == "Type":
                table.setdefault(row.name, []).append((arm.name, row))
    for number, (title, lines) in enumerate(table.items()):
        if number:
            yield ""
        yield fit(title, width)
        for name, row in lines:
            yield _line(row, f"  {fit(name, _NAME - 4)}", width, parser)


def _header(width: int, parser: Reading) -> str:
    other = "strict" if parser == "lenient" else "lenient"
    said = f"{'n':>{_NAME + 5}}{parser:>9}{'95 %':>9}{other:>10}{'95 %':>9}"
    room = width - _NAME - _FIGURES
    if room >= _STRIP:
        said = f"{said:<{_NAME + _FIGURES + 3}}0{'100 %':>{room - 4}}"
    return fit_right(said, width)


def fit_right(said: str, width: int) -> str:
    """`said`, our own spaces kept, cut to `width` columns."""
    if columns(said) <= width:
        return said.rstrip()
    while columns(said) > width:
        said = said[:-1]
    return said.rstrip()


def _line(row: Row, name: str, width: int, parser: Reading) -> str:
    first, second = (row.cells[r]["answered"] for r in (parser, "strict" if parser == "lenient" else "lenient"))
    name = f"{name}{' †' if row.small else ''}"
    said = name + " " * max(1, _NAME - columns(name)) + f"{first['n']:>5,}"
    said += f"{share(first):>8} {interval(first):>11}{share(second):>8} {interval(second):>11}"
    room = width - columns(said) - 3
    return fit_right(f"{said}   {_strip(first, room)}" if room >= _STRIP and first["n"] else said, width)


def _strip(cell: Cell, room: int) -> str:
    """The interval from 0 to 1 over `room` columns, a dot where the accuracy is."""
    low, value, high = (round(cell[key] * (room - 1)) for key in ("low", "value", "high"))
    marks = ["·" if place in (0, room - 1) else " " for place in range(room)]
    marks[low : high + 1] = "─" * (high + 1 - low)
    marks[low], marks[high], marks[value] = "├", "┤", "●"
    return "".join(marks)


def _pairs(comparisons: Sequence[Comparison], width: int) -> Iterator[str]:
    for c in comparisons:
        yield from wrap(
            f"{findings.pair(c)}; {c.second} {findings.points(c.difference)} points ({findings.points(c.low)} to "
            f"{findings.points(c.high)}) on {c.n:,} questions, {c.only_second} right only by {c.second}, "
            f"{c.only_first} only by {c.first}; p {findings.p_value(c.p_exact)}, Holm {findings.p_value(c.p_holm)}",
            width,
            "  ",
        )
