"""`report.md`: the same as the page, for a repository, a pull request or a diff."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pomona.io.atomic import atomic_file
from pomona.methods.nlpbench_eval import findings, replies
from pomona.methods.nlpbench_eval.arms import Arm, Comparison
from pomona.methods.nlpbench_eval.findings import NAMES, Cell, Reading, both, interval, share
from pomona.methods.nlpbench_eval.replies import Question
from pomona.report.text import escape, lines, one_line

_REPLY = 300  # characters of a reply that Markdown shows; the page and answers.jsonl have more
_TEXT = 1500  # of a question or a context


def write_markdown(path: Path, arms: Sequence[Arm], comparisons: Sequence[Comparison], parser: Reading) -> None:
    """Write the report of `arms` to `path`; `parser` is the reading that comes first.

    Raises:
        OutputError: `path` cannot be written.
    """
    with atomic_file(path) as file:
        file.write("\n".join(_document(arms, comparisons, parser)).encode("utf-8"))


def _document(arms: Sequence[Arm], comparisons: Sequence[Comparison], parser: Reading) -> Iterator[str]:
    readings = _readings(parser)
    yield f"# NLPBench: {_cell(findings.heading(arms))}\n"
    yield f"**{_cell(findings.verdict(arms, parser), 2000)}**\n"
    for said in findings.standing(arms, comparisons, parser):
        yield f"- {_cell(said, 300)}"
    for said in findings.warnings(arms):
        yield f"- ! {_cell(said, 500)}"
    yield ""
    yield from _settings(arms)
    if len(arms) > 1:
        yield "## Accuracy by run\n"
        head = ["run", *(f"{reading}" for reading in readings)]
        accuracy = [(arm.name, arm.result["accuracy"]) for arm in arms]
        yield from _table(
            head, "l" + "l" * 2, ([name, *(both(a[r]["answered"]) for r in readings)] for name, a in accuracy)
        )
        yield from _heat(arms, parser)
        yield from _pairs(comparisons, parser)
    yield "## Of which questions\n"
    of = ((name, kind, lenient, strict) for name, kind, lenient, strict in findings.denominators(arms))
    yield from _table(
        ["run", "of", *readings], "llll",
        ([name, kind, *(both(c) for c in _ordered(lenient, strict, parser))] for name, kind, lenient, strict in of),
    )  # fmt: skip
    for arm in arms:
        yield f"## Accuracy{f': {_cell(arm.name)}' if len(arms) > 1 else ''}\n"
        yield from _accuracy(arm, parser)
    yield "## The run\n" if len(arms) == 1 else "## The runs\n"
    yield from _table(["", "", *(arm.name for arm in arms)], "ll" + "r" * len(arms),
                      ([part, name, *values] for part, name, values in findings.conduct(arms)))  # fmt: skip
    for said in findings.power(arms):
        yield f"{_cell(said, 500)}\n"
    yield "## Questions\n"
    yield f"At most {_REPLY:,} characters of a reply and {_TEXT:,} of a question; report.html has more.\n"
    for questions in replies.groups(arms):
        yield from _group(questions, arms, parser)


def _readings(parser: Reading) -> tuple[Reading, Reading]:
    return ("lenient", "strict") if parser == "lenient" else ("strict", "lenient")


def _ordered(lenient: Cell, strict: Cell, parser: Reading) -> tuple[Cell, Cell]:
    return (lenient, strict) if parser == "lenient" else (strict, lenient)


def _settings(arms: Sequence[Arm]) -> Iterator[str]:
    shared, differing = findings.settings(arms)
    facts = [("data", said) for said in dict.fromkeys(findings.data(arm) for arm in arms)] + shared
    yield from _table(["setting", ""], "ll", facts)
    if differing:
        yield from _table(
            ["differs", *(arm.name for arm in arms)], "l" * (1 + len(arms)), ([k, *v] for k, v in differing)
        )


def _accuracy(arm: Arm, parser: Reading) -> Iterator[str]:
    readings, by_group = _readings(parser), findings.clustered(arm.result)
    figures = [(r, "95 %", *(["by group"] if by_group else [])) for r in readings]
    head = [
        "",
        "n",
        *(name for names in figures for name in names),
        "all n",
        *(n for r in readings for n in (f"{r}, all", "95 %")),
    ]
    rows = []
    for row in findings.rows(arm.result):
        name = f"{row.part}: {row.name}" if row.part else row.name
        answered, everything = ([row.cells[r][of] for r in readings] for of in ("answered", "all"))
        line = [f"{name}{' †' if row.small else ''}", f"{answered[0]['n']:,}"]
        for cell in answered:
            line += [share(cell), interval(cell), *([interval(cell, "cluster_")] if by_group else [])]
        line.append(f"{everything[0]['n']:,}")
        for cell in everything:
            line += [share(cell), interval(cell)]
        rows.append(line)
    yield from _table(head, "l" + "r" * (len(head) - 1), rows)
    yield (
        "95 %: Wilson interval, in per cent."
        f"{' By group: questions of one context drawn together.' if by_group else ''} † fewer than 20 questions. "
        "All: unanswered counts as wrong.\n"
    )


def _heat(arms: Sequence[Arm], parser: Reading) -> Iterator[str]:
    yield "## Where they differ\n"
    lines = {arm.name: {(row.part, row.name): row for row in findings.rows(arm.result)} for arm in arms}
    keys = list(dict.fromkeys(key for rows in lines.values() for key in rows if key[0] != "Type and context"))

    def said(name: str, key: tuple[str, str]) -> str:
        row = lines[name].get(key)
        return "–" if row is None else both(row.cells[parser]["answered"])

    rows = ([part, name, *(said(arm.name, (part, name)) for arm in arms)] for part, name in keys)
    yield from _table(["", f"{parser} reading", *(arm.name for arm in arms)], "ll" + "l" * len(arms), rows)


def _pairs(comparisons: Sequence[Comparison], parser: Reading) -> Iterator[str]:
    if not comparisons:
        return
    yield "## Pair by pair\n"
    points, p = findings.points, findings.p_value
    yield from _table(findings.PAIR_COLUMNS, findings.PAIR_SIDES, (
        [c.first, c.second, f"{c.n:,}", f"{c.only_first:,}", f"{c.only_second:,}", points(c.difference),
         f"{points(c.low)} to {points(c.high)}", p(c.p_exact), p(c.p_mid), p(c.p_holm), c.verdict]
        for c in comparisons
    ))  # fmt: skip
    yield (
        f"Second minus first, in points, {parser} reading. Interval: paired bootstrap over groups. p: McNemar; Holm "
        "corrects the exact one for all pairs.\n"
    )


def _group(questions: Sequence[Question], arms: Sequence[Arm], parser: Reading) -> Iterator[str]:
    said = replies.context(questions[0].asked)
    if said is not None:
        name = _cell(str(questions[0].asked.get("group") or ""), 40)
        yield f"<details><summary>{name}: context</summary>\n\n{_broken(said)}\n\n</details>\n"
    for question in questions:
        yield from _question(question, arms, parser)


def _question(question: Question, arms: Sequence[Arm], parser: Reading) -> Iterator[str]:
    asked, readings = question.asked, _readings(parser)
    fates = [str(replies.fate(line, parser)) for line in question.replies]
    marks = "; ".join(
        f"{_cell(arm.name, 24)} {_cell(fate)}" if len(arms) > 1 else _cell(fate)
        for arm, fate in zip(arms, fates, strict=True)
    )
    words = replies.text(asked, "question") or ""
    yield f"<details><summary>{_cell(str(asked['id']), 40)}: {_cell(words, 90)} ({marks})</summary>\n"
    kind, category = (NAMES.get(str(asked.get(k))) or str(asked.get(k)) for k in ("type", "category"))
    yield f"{_cell(kind, 40)}; {_cell(category, 40)}\n"
    if len(words) > 90:
        yield f"{_broken(words)}\n"
    options = replies.options(asked)
    if options:
        yield "<br>\n".join(f"{number}: {_cell(option, 300)}" for number, option in enumerate(options)) + "\n"
    yield f"Gold: {_cell(replies.gold(asked), 500)}\n"
    rows = []
    for arm, fate, line in zip(arms, fates, question.replies, strict=True):
        if line is None:
            rows.append([arm.name, fate, "", "", "", ""])
            continue
        shown, cut = replies.excerpt(replies.reply(line), _REPLY)
        read = [replies.parsed(line, r) if replies.read(line, r) else "" for r in readings]
        rows.append([arm.name, fate, f"{shown}{f' [{cut}]' if cut else ''}", *read, replies.judgement(line) or ""])
    yield from _table(["run", "", "reply", *readings, "judge"], "llllll", rows)
    yield "</details>\n"


def _cell(text: str, room: int = 120) -> str:
    return escape(one_line(text, room))


def _broken(text: str) -> str:
    """`text` with its own line breaks."""
    shown, cut = replies.excerpt(text, _TEXT)
    return "<br>".join(escape(line) for line in (*lines(shown).split("\n"), *([cut] if cut else [])))


def _table(head: Sequence[str], aligned: str, rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table; `aligned` has an l or r for each column. Ends with a blank line."""
    yield f"| {' | '.join(_cell(name, 60) for name in head)} |"
    yield f"|{'|'.join('---:' if side == 'r' else '---' for side in aligned)}|"
    for row in rows:
        yield f"| {' | '.join(_cell(value, 600) for value in row)} |"
    yield ""
