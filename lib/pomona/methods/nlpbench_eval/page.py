"""`report.html`: one file to open, print or send."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from pomona.io.atomic import atomic_file
from pomona.methods.nlpbench_eval import findings
from pomona.methods.nlpbench_eval.arms import Arm, Comparison
from pomona.methods.nlpbench_eval.findings import Cell, Reading, Row, interval, share
from pomona.methods.nlpbench_eval.listing import CSS, listing
from pomona.report.html import Html, element, join, page, shade, strip, table
from pomona.report.text import one_line

_OTHER: dict[Reading, Reading] = {"lenient": "strict", "strict": "lenient"}


def write_page(path: Path, arms: Sequence[Arm], comparisons: Sequence[Comparison], parser: Reading) -> None:
    """Write the report of `arms` to `path`; `parser` is the reading that comes first.

    Raises:
        OutputError: `path` cannot be written.
    """
    with atomic_file(path) as file:
        file.write(_document(arms, comparisons, parser).encode("utf-8"))


def _document(arms: Sequence[Arm], comparisons: Sequence[Comparison], parser: Reading) -> str:
    warnings = findings.warnings(arms)
    body = [
        _head(arms, comparisons, parser),
        element("ul", *(element("li", said) for said in warnings), class_="notes") if warnings else None,
        _settings(arms),
    ]
    if len(arms) > 1:
        body += [_bars(arms, parser), _heat(arms, parser), _pairs(comparisons, parser)]
    body += [_accuracy(arms, parser), _conduct(arms), listing(arms, parser)]
    return page(f"NLPBench: {one_line(findings.heading(arms), 120)}", *body, css=CSS)


def _head(arms: Sequence[Arm], comparisons: Sequence[Comparison], parser: Reading) -> Html:
    return element(
        "header",
        element("p", "NLPBench", class_="over"),
        element("h1", findings.heading(arms)),
        element("p", findings.verdict(arms, parser), class_="lead"),
        element("p", " ".join(f"{said}." for said in findings.standing(arms, comparisons, parser))),
    )


def _settings(arms: Sequence[Arm]) -> Html:
    shared, differing = findings.settings(arms)
    facts = [("data", said) for said in dict.fromkeys(findings.data(arm) for arm in arms)] + shared
    told = element(
        "dl", *(element("div", element("dt", name), element("dd", value)) for name, value in facts), class_="facts"
    )
    if not differing:
        return told
    head = element("tr", element("th", "differing settings", scope="col"), *(_column(arm.name) for arm in arms))
    body = [element("tr", _first(name), *(element("td", v) for v in values)) for name, values in differing]
    return join(told, table([head], body))


# --- several arms ----------------------------------------------------------------------------------------------------


def _bars(arms: Sequence[Arm], parser: Reading) -> Html:
    """A bar for each arm and reading, with its interval."""
    readings = (parser, _OTHER[parser])
    by_group = any(findings.clustered(arm.result) for arm in arms)
    head = element(
        "tr",
        _column("run"),
        element("th", _scale(), scope="col"),
        element("th", "n", class_="n", scope="col"),
        *_readings(parser, by_group),
    )
    body = []
    for arm in arms:
        cells = [arm.result["accuracy"][reading]["answered"] for reading in readings]
        drawn = element("td", _strip(cells, readings, arm.name, filled=True), class_="strip wide")
        figures = [_accuracy_cells(cell, by_group) for cell in cells]
        body.append(element("tr", _first(arm.name), drawn, _n(cells[0]), *figures, class_="bar"))
    said = (
        "Share of answered questions that are right, with 95 % Wilson intervals. "
        f"Solid: {parser}; hollow: {readings[1]}."
    )
    return _section("Accuracy by run", table([head], body, said), _denominators(arms, parser))


def _denominators(arms: Sequence[Arm], parser: Reading) -> Html:
    readings = [element("th", reading, colspan="2", scope="col") for reading in (parser, _OTHER[parser])]
    head = element("tr", _column("run"), _column("of"), element("th", "n", class_="n", scope="col"), *readings)
    bodies = []
    for name, lines in groupby(findings.denominators(arms), lambda line: line[0]):
        trs = []
        for number, (_, of, lenient, strict) in enumerate(lines):
            cells = (lenient, strict) if parser == "lenient" else (strict, lenient)
            first = _first(name) if number == 0 else element("td")
            trs.append(element("tr", first, element("td", of), _n(cells[0]), *(_accuracy_cells(c) for c in cells)))
        bodies.append(element("tbody", *trs))
    return join(element("h3", "Of which questions"), table([head], bodies))


def _heat(arms: Sequence[Arm], parser: Reading) -> Html:
    """Type and category by arm; every cell says its value, n and interval, the colour only repeats it."""
    lines = {arm.name: {(row.part, row.name): row for row in findings.rows(arm.result)} for arm in arms}
    keys = list(dict.fromkeys(key for rows in lines.values() for key in rows if key[0] != "Type and context"))
    head = element("tr", element("td"), *(_column(arm.name) for arm in arms))
    bodies = [
        element("tbody", *(
            element("tr", _first(name), *(_heat_cell(lines[arm.name].get((part, name)), parser) for arm in arms))
            for _, name in together
        ))
        for part, together in groupby(keys, lambda key: key[0])
    ]  # fmt: skip
    said = f"Accuracy of answered questions, {parser} reading, with 95 % interval and n. † fewer than 20 questions."
    return _section("Where they differ", element("div", table([head], bodies, said), class_="heat"))


def _heat_cell(row: Row | None, parser: Reading) -> Html:
    cell = row.cells[parser]["answered"] if row else None
    if not cell or not cell["n"]:
        return element("td", "–", class_="none")
    told = element("span", f"{interval(cell)}, n {cell['n']:,}")
    value = join(element("b", share(cell)), "†" if cell["small"] else None)
    if cell["small"]:
        return element("td", value, told, class_="small")
    return element("td", value, told, style=shade(cell["value"]))


def _pairs(comparisons: Sequence[Comparison], parser: Reading) -> Html | None:
    if not comparisons:
        return None
    columns = zip(findings.PAIR_COLUMNS, findings.PAIR_SIDES, strict=True)
    head = element("tr", *(element("th", n, scope="col", class_="n" if side == "r" else None) for n, side in columns))
    body = []
    for c in comparisons:
        counts = [element("td", f"{v:,}", class_="n") for v in (c.n, c.only_first, c.only_second)]
        tests = [element("td", findings.p_value(p), class_="n") for p in (c.p_exact, c.p_mid, c.p_holm)]
        reach = f"{findings.points(c.low)} to {findings.points(c.high)}"
        body.append(element(
            "tr", _first(one_line(c.first, 40)), element("td", one_line(c.second, 40)), *counts,
            element("td", element("b", findings.points(c.difference)), class_="n"), element("td", reach, class_="ci"),
            *tests, element("td", one_line(c.verdict, 120)),
        ))  # fmt: skip
    said = (
        f"Second minus first, in points, {parser} reading. Only first, only second: questions one of the two got "
        "right. Interval: paired bootstrap over groups. p: McNemar, exact and mid-p; Holm corrects the exact one for "
        "all pairs."
    )
    return _section("Pair by pair", table([head], body, said))


# --- each arm --------------------------------------------------------------------------------------------------------


def _accuracy(arms: Sequence[Arm], parser: Reading) -> Html:
    if len(arms) == 1:
        return _section("Accuracy", _accuracy_table(arms[0], parser))
    folded = [
        element("details", element("summary", one_line(arm.name, 60)), _accuracy_table(arm, parser)) for arm in arms
    ]
    return _section("Accuracy in full", *folded)


def _accuracy_table(arm: Arm, parser: Reading) -> Html:
    by_group = findings.clustered(arm.result)
    readings = (parser, _OTHER[parser])
    head = [
        element("tr", element("td", rowspan="2"), element("th", _scale(), rowspan="2", scope="col"),
                element("th", "of answered", colspan=str(1 + len(readings) * (3 if by_group else 2)), scope="colgroup"),
                element("th", "of all", colspan="5", scope="colgroup")),
        element("tr", element("th", "n", class_="n", scope="col"), *_readings(parser, by_group),
                element("th", "n", class_="n", scope="col"), *_readings(parser)),
    ]  # fmt: skip
    bodies = []
    for part, rows in groupby(findings.rows(arm.result), lambda row: row.part):
        trs = [element("tr", element("th", part, class_="part", colspan="13", scope="rowgroup"))] if part else []
        for row in rows:
            answered = [row.cells[reading]["answered"] for reading in readings]
            everything = [row.cells[reading]["all"] for reading in readings]
            trs.append(element(
                "tr", _first(f"{row.name}{' †' if row.small else ''}"),
                element("td", _strip(answered, readings, row.name, filled=False), class_="strip"),
                _n(answered[0]), *(_accuracy_cells(cell, by_group) for cell in answered),
                _n(everything[0]), *(_accuracy_cells(cell) for cell in everything),
                class_="small" if row.small else None,
            ))  # fmt: skip
        bodies.append(element("tbody", *trs))
    said = (
        f"Accuracy with 95 % Wilson interval{'; by group: questions of one context together' if by_group else ''}. "
        f"Solid dot: {parser}; hollow: {readings[1]}. † fewer than 20 questions. Of all: unanswered counts as wrong."
    )
    return table(head, bodies, said)


def _conduct(arms: Sequence[Arm]) -> Html:
    names = [element("th", one_line(arm.name if len(arms) > 1 else "", 40), class_="n", scope="col") for arm in arms]
    tables = []
    for part, lines in groupby(findings.conduct(arms), lambda line: line[0]):
        head = element("tr", element("th", part, scope="col"), *names)
        rows = [
            element("tr", _first(name), *(element("td", v, class_="n") for v in values)) for _, name, values in lines
        ]
        tables.append(table([head], rows))
    return _section(
        "The run" if len(arms) == 1 else "The runs",
        element("div", *tables, class_="beside"),
        *(element("p", said, class_="quiet") for said in findings.power(arms)),
    )


# --- cells -----------------------------------------------------------------------------------------------------------


def _section(title: str, *children: Html | None) -> Html:
    return element("section", "\n", element("h2", title), *children)


def _first(name: str) -> Html:
    return element("th", name, scope="row")


def _column(name: str) -> Html:
    return element("th", one_line(name, 40), scope="col")


def _readings(parser: Reading, by_group: bool = False) -> Iterator[Html]:
    for reading in (parser, _OTHER[parser]):
        yield element("th", reading, class_="n", scope="col")
        yield element("th", "95 %", scope="col")
        if by_group:
            yield element("th", "by group", scope="col")


def _scale() -> Html:
    return element("span", *(element("span", said) for said in ("0", "50", "100 %")), class_="scale")


def _n(cell: Cell) -> Html:
    return element("td", f"{cell['n']:,}", class_="n")


def _accuracy_cells(cell: Cell, by_group: bool = False) -> Html:
    cells = [element("td", element("b", share(cell)), class_="n"), element("td", interval(cell), class_="ci")]
    if by_group:
        cells.append(element("td", interval(cell, "cluster_"), class_="ci"))
    return join(*cells)


def _strip(cells: Sequence[Cell], readings: Sequence[Reading], name: str, *, filled: bool) -> Html | None:
    known = [(cell, reading) for cell, reading in zip(cells, readings, strict=True) if cell["n"]]
    if len(known) < len(cells):
        return None
    title = f"{name}: " + "; ".join(f"{reading} {findings.both(cell)}" for cell, reading in known)
    return strip([(cell["value"], cell["low"], cell["high"]) for cell, _ in known], title, filled=filled)
