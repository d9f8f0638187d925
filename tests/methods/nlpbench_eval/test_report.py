"""What people see of runs: the page, the Markdown and the terminal."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.cells import cell_len

from pomona.methods.nlpbench_eval import findings, replies
from pomona.methods.nlpbench_eval.arms import Arm
from pomona.methods.nlpbench_eval.page import write_page
from pomona.methods.nlpbench_eval.report import write_markdown
from pomona.methods.nlpbench_eval.terminal import terminal_lines
from sample_runs import HOSTILE, arm, arms, cell, comparisons

VOID = {"meta", "input", "br", "hr"}
PERCENTAGE = re.compile(r"\d%")
INTERVAL = re.compile(r"\d+\.\d–\d+\.\d")
COUNT = re.compile(r"n \d+|^\d[\d,]*$")


class Page(HTMLParser):
    """A document taken apart: balanced tags, every attribute, tables as rows of cells, blocks of text."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.blocks: list[str] = []
        self.text: list[str] = []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "pre":
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "pre" in self.open:
            self.blocks[-1] += data
        if ("td" in self.open or "th" in self.open) and "svg" not in self.open:
            self.tables[-1][-1][-1] += data


def _page(tmp_path: Path, several: Sequence[Arm], parser: findings.Reading = "lenient") -> Page:
    write_page(tmp_path / "r.html", several, comparisons(several), parser)
    return Page((tmp_path / "r.html").read_text(encoding="utf-8"))


def _markdown(tmp_path: Path, several: Sequence[Arm]) -> str:
    write_markdown(tmp_path / "r.md", several, comparisons(several), "lenient")
    return (tmp_path / "r.md").read_text(encoding="utf-8")


def _markdown_tables(text: str) -> list[list[list[str]]]:
    """The tables as an independent parser sees them."""
    tables: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline" and tables and token.map and token.level == 4:
            tables[-1][-1].append("".join(child.content for child in token.children or []))
    return tables


def _unsupported(rows: list[list[str]]) -> list[list[str]]:
    """Rows with a percentage that has no interval in its own cell or the next, or no n beside it."""
    bad = []
    for row in rows:
        for place, said in enumerate(row):
            near = said + " " + (row[place + 1] if place + 1 < len(row) else "")
            counted = any(COUNT.search(other.strip()) for other in row)
            if PERCENTAGE.search(said) and not (INTERVAL.search(near) and counted):
                bad.append(row)
    return bad


@pytest.mark.parametrize("several", [arms(), arms()[:1]], ids=["several", "one"])
def test_the_page_needs_nothing_from_outside_and_runs_nothing(tmp_path: Path, several: list[Arm]) -> None:
    page = _page(tmp_path, several)
    assert not {"script", "link", "img", "iframe", "object", "a", "base", "form"} & set(page.tags)
    names = {name for _, name, _ in page.attributes}
    assert not {"src", "href", "xlink:href", "action"} & names
    assert not any(name.startswith("on") for name in names)
    assert not any("url(" in value for _, _, value in page.attributes)
    style = (tmp_path / "r.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style and "//" not in style


def test_hostile_replies_are_shown_as_text(tmp_path: Path) -> None:
    page = _page(tmp_path, arms())
    script, closing = HOSTILE[0], HOSTILE[1]
    assert script in page.blocks and closing in page.blocks
    everything = "".join(page.text)
    assert not set(everything) & set("\x00\x07\x1b\x9b\u202e\u2066\u200b\ufeff\ud800")
    assert any("\ufffd[31mred" in block for block in page.blocks)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_harmless_wherever_it_stands(tmp_path: Path, text: str) -> None:
    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: v if k in ("state", "type", "id", "group") else spoil(v) for k, v in value.items()}
        return [spoil(v) for v in value] if isinstance(value, list) else text if isinstance(value, str) else value

    several = [
        Arm(f"{text[:300]}{n}", one.result, [spoil(a) for a in one.answers[:12]]) for n, one in enumerate(arms())
    ]
    for one in several:
        one.result["settings"]["model"] = one.result["data"]["sources"][0] = text  # type: ignore[index]
        one.result["finish_reasons"][text] = one.result["states"][text] = 1
        one.result["downgrades"][text] = text
        one.result["by_category"][text] = one.result["by_category"]["ai"]
    page, markdown = _page(tmp_path, several), _markdown(tmp_path, several)
    rendered = Page(MarkdownIt("commonmark").enable("table").render(markdown))
    for seen in (page, rendered):
        assert not {"script", "a", "img"} & set(seen.tags)
        assert not set("".join(seen.text)) & set("\x00\x07\x1b\x9b\u202e\u2066\u200b\ufeff")
    assert all(len({len(row) for row in table}) == 1 for table in _markdown_tables(markdown))
    assert len(markdown) < 500_000 and (tmp_path / "r.html").stat().st_size < 1_500_000
    lines = terminal_lines(several, comparisons(several))
    assert max(map(cell_len, lines)) <= 80 and all(line.isprintable() for line in lines)


def test_a_reply_of_a_megabyte_is_cut_with_a_note(tmp_path: Path) -> None:
    page = _page(tmp_path, arms())
    assert max(map(len, page.blocks)) <= 4000
    assert any("4,000 of 1,000,000 characters" in said for said in page.text)
    assert (tmp_path / "r.html").stat().st_size < 400_000


def test_every_accuracy_has_its_n_and_interval(tmp_path: Path) -> None:
    for several in (arms(), arms()[:1]):
        rows = [row for table in _page(tmp_path, several).tables for row in table]
        assert sum(bool(PERCENTAGE.search(" ".join(row))) for row in rows) > 15
        assert _unsupported(rows) == []
        rows = [row for table in _markdown_tables(_markdown(tmp_path, several)) for row in table]
        assert sum(bool(PERCENTAGE.search(" ".join(row))) for row in rows) > 15
        assert _unsupported(rows) == []
    assert _unsupported([["zs", "41.2%", "", "51"]]) and _unsupported([["zs", "41.2%, 28.8–54.8"]])


def test_markdown_tables_have_a_constant_number_of_columns(tmp_path: Path) -> None:
    text = _markdown(tmp_path, [arm("zs | <b>", 0.4), *arms()])
    tables = _markdown_tables(text)
    assert len(tables) > 60  # one for each question, too
    assert all(len({len(row) for row in table}) == 1 for table in tables)
    block: list[str] = []
    for line in [*text.split("\n"), ""]:  # no other parser in between
        if line.startswith("|"):
            block.append(line)
        elif block:
            assert len({row.count("|") for row in block}) == 1
            block = []
    assert "zs | <b>" in [row[0] for table in tables for row in table]


def test_markdown_renders_no_markup_of_a_reply(tmp_path: Path) -> None:
    rendered = MarkdownIt("commonmark").enable("table").render(_markdown(tmp_path, arms()))
    page = Page(rendered)
    assert not {"script", "a", "img"} & set(page.tags)
    assert page.tags.count("details") == rendered.count("</details>")


@pytest.mark.parametrize("width", [20, 40, 80, 132])
def test_no_terminal_line_is_wider_than_the_terminal(width: int) -> None:
    strange = arm("漢字の結果\x1b[31m\u202eevil" * 4, 0.5, model="模型" * 60)
    for several in (arms(), arms()[:1], [strange, *arms()], [strange]):
        lines = terminal_lines(several, comparisons(several), width)
        assert max(map(cell_len, lines)) <= width
        assert all(line.isprintable() for line in lines)


def test_a_terminal_shows_the_accuracy_of_each_arm_with_n_and_interval() -> None:
    several = arms()
    text = "\n".join(terminal_lines(several, comparisons(several)))
    for one in several:
        of = one.result["accuracy"]
        for reading in ("lenient", "strict"):
            for denominator in ("answered", "all"):
                c = of[reading][denominator]
                assert f"{c['k'] / c['n']:.1%}" in text
        c = of["lenient"]["answered"]
        assert re.search(
            rf"{one.name} +{c['n']} +{c['k'] / c['n']:.1%} +{100 * c['low']:.1f}–{100 * c['high']:.1f}", text
        )
    assert "cot better than zs" in text and "not distinguishable" in text


def test_the_same_runs_give_the_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sample_runs import arms, comparisons\n"
        "from pomona.methods.nlpbench_eval.page import write_page\n"
        "from pomona.methods.nlpbench_eval.report import write_markdown\n"
        "from pomona.methods.nlpbench_eval.terminal import terminal_lines\n"
        "several, out = arms(), Path(sys.argv[1])\n"
        "write_page(out / 'r.html', several, comparisons(several), 'strict')\n"
        "write_markdown(out / 'r.md', several, comparisons(several), 'strict')\n"
        "print('\\n'.join(terminal_lines(several, comparisons(several))))\n"
        "heavy = {'scipy', 'torch', 'transformers', 'openai', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    seen = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        out.mkdir()
        path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path, "PYTHONUTF8": "1"}
        done = subprocess.run([sys.executable, "-c", code, out], env=environment, capture_output=True, check=True)
        seen.append((done.stdout, (out / "r.html").read_bytes(), (out / "r.md").read_bytes()))
    assert seen[0] == seen[1]


def test_no_questions_are_a_dash_and_never_a_perfect_score(tmp_path: Path) -> None:
    one = arm("zs", 0.5)
    result = dict(one.result)
    empty = {r: {"answered": cell([], False), "all": cell([], False)} for r in ("strict", "lenient")}
    result["by_category"] = {"pdda": empty}
    several = [Arm("zs", result, one.answers)]
    rows = [row for table in _page(tmp_path, several).tables for row in table if row[0].startswith("Pragmatics")]
    assert rows and all("%" not in said for row in rows for said in row) and "–" in rows[0]
    assert re.search(r"^Pragmatics, dialogue +0 +– +–", "\n".join(terminal_lines(several, [])), re.MULTILINE)
    result["accuracy"] = empty
    assert "No question was answered" in "\n".join(terminal_lines([Arm("zs", result, one.answers)], []))


def test_small_cells_are_marked_in_words_too(tmp_path: Path) -> None:
    one = arms()[:1]
    for row in findings.rows(one[0].result):
        n = row.cells["lenient"]["answered"]["n"]
        assert row.small == (0 < n < 20)
    names = [row[0] for table in _page(tmp_path, one).tables for row in table if row]
    assert "Mathematics †" in names and "All questions" in names
    assert any(tag == "tr" and value == "small" for tag, _, value in _page(tmp_path, one).attributes)


def test_the_common_denominator_holds_what_every_arm_answered() -> None:
    several = arms()
    ok = [
        {a["id"]: a["lenient"]["correct"] for a in one.answers if a["lenient"].get("correct") is not None}
        for one in several
    ]
    common = set.intersection(*(set(one) for one in ok))
    assert 0 < len(common) < min(map(len, ok))
    told = {(name, of): lenient for name, of, lenient, _ in findings.denominators(several)}
    for one, correct in zip(several, ok, strict=True):
        c = told[one.name, "answered by every run"]
        assert (c["k"], c["n"]) == (sum(correct[i] for i in common), len(common))
        assert told[one.name, "all, unanswered wrong"]["n"] == 60
        assert told[one.name, "answered"]["n"] == len(correct)


FATES: list[tuple[dict[str, Any], str]] = [
    ({"state": "ok", "lenient": {"correct": True}}, "✓ right"),
    ({"state": "ok", "lenient": {"correct": False}}, "✗ wrong"),
    ({"state": "truncated", "lenient": {"correct": False}}, "✗ wrong (truncated)"),
    ({"state": "empty", "lenient": {"correct": False}}, "∅ no answer (empty)"),
    ({"state": "context_overflow"}, "∅ no answer (context overflow)"),
    (
        {"state": "ok", "lenient": {"correct": None}, "judgement": {"status": "judge_error"}},
        "? not scored (judge error)",
    ),
]


@pytest.mark.parametrize(("line", "said"), FATES)
def test_a_fate_is_told_by_word_and_symbol(line: dict[str, Any], said: str) -> None:
    assert str(replies.fate(line, "lenient")) == said


def test_every_question_shows_each_arms_fate_and_its_gold(tmp_path: Path) -> None:
    several = arms()
    text = "".join(_page(tmp_path, several).text)
    for one in several:
        for said in ("✓ right", "✗ wrong", "∅ no answer", "? not scored"):
            count = sum(replies.fate(a, "lenient").short == said for a in one.answers)
            assert text.count(f"{one.name} {said}") == 2 * count  # in the summary and when unfolded
    choices = sum(len(a["gold"]) for a in several[0].answers if a["type"] == "mc")
    assert text.count("← gold") == choices
    assert text.count("Gold ") == sum(a["type"] != "mc" for a in several[0].answers)


def test_a_context_is_shown_once_for_its_questions(tmp_path: Path) -> None:
    several = arms()
    groups = {a["group"] for a in several[0].answers} - {None}
    page = _page(tmp_path, several)
    assert sum(block.startswith("Consider grammar") for block in page.blocks) == len(groups)
    assert _markdown(tmp_path, several).count("Consider grammar") == len(groups)


def test_what_strict_and_lenient_read_stands_side_by_side() -> None:
    line = {
        "type": "mc",
        "state": "ok",
        "strict": {"parsed": None, "correct": False},
        "lenient": {"parsed": [0, 2], "correct": True},
    }
    assert replies.parsed(line, "strict") == "nothing readable ✗ wrong"
    assert replies.parsed(line, "lenient") == "0, 2 ✓ right"


def test_the_reading_asked_for_comes_first(tmp_path: Path) -> None:
    one = arms()[:1]
    heads = {p: _page(tmp_path, one, p).tables[0][1] for p in ("lenient", "strict")}  # type: ignore[arg-type]
    assert [h for h in heads["strict"] if h in ("strict", "lenient")] == ["strict", "lenient"] * 2
    assert [h for h in heads["lenient"] if h in ("strict", "lenient")] == ["lenient", "strict"] * 2
    strict = one[0].result["accuracy"]["strict"]["answered"]
    assert f"{strict['value']:.1%} of {strict['n']}" in " ".join(terminal_lines(one, [], 80, "strict"))


@pytest.mark.parametrize("how", ["hash", "absent"])
def test_withheld_texts_are_said_to_be(tmp_path: Path, how: str) -> None:
    several = copy.deepcopy(arms())
    for one in several:
        for line in one.answers:
            for key in ("question", "options", "context", "gold", "answer", "thoughts"):
                if isinstance(line, dict) and line.get(key):
                    line[key] = {"sha256": "ab" * 32}
                    if how == "absent":
                        del line[key]
            for inner, key in (("votes", "samples"), ("judgement", "reason")):
                if inner in line:
                    del line[inner][key]
    page, markdown = _page(tmp_path, several), _markdown(tmp_path, several)
    for text in ("".join(page.text), markdown):
        assert text.count("withheld") >= 60 * 2
        for told in ("Consider", "smoothing", "Good-Turing", "The answer is", "brevity", "Names the method", "abab"):
            assert told not in text


def test_warnings_count_what_went_wrong_and_say_what_to_do() -> None:
    several = arms()
    told = findings.warnings(several)
    for one in several:
        by_reason = {a["finish_reason"] for a in one.answers if a["state"] == "empty"}
        remedy = "Raise --max-tokens." if "length" in by_reason else "The log of calls shows what the server sent."
        count = f"{one.name} {one.result['states']['empty']}"
        assert any(
            f"({'finish reason ' + ', '.join(sorted(by_reason))})" in s and count in s and remedy in s for s in told
        )
    assert any(said.startswith("Short answers not scored, the judge gave no verdict: zs") for said in told)
    assert any("in points: zs −" in said and "format" in said for said in told)
    clean = copy.deepcopy(several[0].result)
    clean |= {"states": {"ok": 60}, "unscored": {}, "downgrades": {}}  # type: ignore[operator]
    clean["accuracy"]["strict"] = clean["accuracy"]["lenient"]
    assert [s for s in findings.warnings([Arm("zs", clean, ())]) if "†" not in s] == []
    other = Arm("b", {**clean, "data": {**clean["data"], "sha256": "other"}}, ())
    assert "not made on the same data" in findings.warnings([Arm("a", clean, ()), other])[0]


def test_settings_that_differ_are_told_apart_from_those_shared() -> None:
    shared, differing = findings.settings([arm("zs", 0.5), arm("cot", 0.5, shots=3)])
    assert dict(differing) == {"strategy": ["zs", "cot"], "shots": ["0", "3"]}
    assert ("max tokens", "945") in shared and "strategy" not in dict(shared)


def test_votes_are_summed_up() -> None:
    several = arms()
    votes = [a["votes"] for a in several[2].answers if "votes" in a]
    told = {(part, name): values for part, name, values in findings.conduct(several)}
    assert told["Votes", "ties"] == ["0", "0", str(sum(v["tied"] for v in votes))]
    mean = sum(v["share"] for v in votes) / len(votes)
    assert told["Votes", "mean share of the winner"] == ["–", "–", f"{mean:.2f}"]
