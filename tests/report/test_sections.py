"""What report.md and the terminal show of the sections of a run."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from methods.attn_compare.specimens import sections
from pomona.report.sections import Section, Table, markdown, terminal

ABOUT = {"kernels": "exp, linear", "seed": "0", "trials": "1,000"}
HOSTILE = "a|b\n| c `x` <script>alert(1)</script> [l](http://e.org) $x$ \x1b[31m \u202e ![i](x) ## h"


def _shown(text: str) -> str:
    return html.unescape(text)


def _cells(line: str) -> list[str]:
    return [_shown(cell).strip() for cell in line.strip().strip("|").split("|")]


def test_the_title_and_what_stands_under_it_come_first() -> None:
    assert markdown("A *title*", "After *a paper* (arXiv 1).", [], {}).startswith(
        "# A &#42;title&#42;\n\nAfter *a paper* (arXiv 1).\n"
    )


def test_question_and_verdict_of_every_study_come_first_each_on_one_line() -> None:
    text = _shown(markdown("Title", "Under it.", sections(), ABOUT))
    short = text[text.index("## In short") : text.index("## Separation")].strip().splitlines()[2:]
    assert [line.split(".")[0] for line in short] == ["- **Separation", "- **Speed"]
    for line, section in zip(short, sections(), strict=True):
        assert section.question in line and all(said in line for said in section.verdict)


def test_every_part_of_a_section_is_shown_in_order() -> None:
    text = _shown(markdown("Title", "Under it.", sections(), ABOUT))
    section = sections()[0]
    body = text[text.index("## Separation") : text.index("## Speed")]
    parts = [
        section.question,
        *section.verdict,
        *(table.caption for table in section.tables),
        *(caption for _, caption in section.figures),
        *section.notes,
    ]
    places = [body.index(part) for part in parts]
    assert places == sorted(places)
    assert all(f"- {name}: {value}" in text for name, value in ABOUT.items())


def test_figures_are_shown_as_svg_and_link_the_png() -> None:
    odd = Section("speed", "q", ["v"], figures=[("a b(1)", "Time ] of")])
    text = markdown("Title", "Under it.", [odd], {})
    assert re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", text) == [("Time &#93; of", "figures/a%20b%281%29.svg")]
    assert "[PNG](figures/a%20b%281%29.png)" in text


def test_tables_are_whole_aligned_and_columns_of_figures_stand_right() -> None:
    lines = [line for line in markdown("Title", "Under it.", sections(), {}).splitlines() if line.startswith("|")][:5]
    assert len({len(line) for line in lines}) == 1
    assert [rule.endswith(":") for rule in lines[1].strip("|").split("|")] == [False, True, True, True]
    assert _cells(lines[0]) == ["kernel", "success", "95 %", "AUC"]
    assert [_cells(line) for line in lines[2:]] == [list(row) for row in sections()[0].tables[0].rows]
    assert lines[4].endswith(" – |") and lines[2].startswith("| exp ")


def test_a_column_of_words_stays_left_and_short_rows_are_filled() -> None:
    table = Table("c", ["kernel", "note", "n"], [["exp", "2 of 3"], ["linear", "none", "7"], []])
    lines = [
        line
        for line in markdown("Title", "Under it.", [Section("recall", "q", [], tables=[table])], {}).splitlines()
        if "|" in line
    ]
    assert [rule.endswith(":") for rule in lines[1].strip("|").split("|")] == [False, False, True]
    assert all(line.count("|") == 4 for line in lines)


def test_no_text_becomes_markup() -> None:
    table = Table(HOSTILE, [HOSTILE], [[HOSTILE]])
    section = Section(HOSTILE, HOSTILE, [HOSTILE], [HOSTILE], [table], [("stem", HOSTILE)])
    text = markdown("Title", "Under it.", [section], {HOSTILE: HOSTILE})
    assert "<script" not in text and "http://" not in text and "`x`" not in text
    assert not set(text) & set("\x1b\u202e$")
    assert [line.count("|") for line in text.splitlines() if "|" in line] == [2, 2, 2]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.text(max_size=30), min_size=2, max_size=2), min_size=1, max_size=4))
def test_cells_of_any_text_keep_the_table_rectangular(rows: list[list[str]]) -> None:
    text = markdown("Title", "Under it.", [Section("speed", "q", [], tables=[Table("c", ["a", "b"], rows)])], {})
    lines = [line for line in text.split("\n") if line.startswith("|")]
    assert len(lines) == 2 + len(rows) and all(line.count("|") == 3 for line in lines)
    assert "\r" not in text and text.isprintable() is False  # only by its own line breaks
    assert text.replace("\n", "").isprintable()


def test_nothing_to_say_is_said() -> None:
    assert "Nothing was run." in markdown("Title", "Under it.", [], {})
    assert "No verdict." in markdown("Title", "Under it.", [Section("speed", "q", [])], {})


# --- a terminal ------------------------------------------------------------------------------------------------------


def test_a_terminal_shows_question_verdict_and_the_first_table() -> None:
    lines = terminal(sections(), 80)
    assert lines[0] == "Separation: Which kernels tell the two data sets of the construction apart?"
    assert lines[1] == "exp, pow:8 and pow:16 do."
    head = next(number for number, line in enumerate(lines) if "kernel" in line and "success" in line)
    assert lines[head + 1].split() == ["exp", "0.998", "0.993", "to", "0.999", "0.998"]
    assert {len(line) for line in lines[head : head + 4]} == {len(lines[head])}  # figures end in one column
    assert not any("Where each begins" in line for line in lines)
    assert lines[-2:] == ["Speed: From which length does linear attention pay?", "From 210 tokens forward."]


def test_long_tables_say_what_is_left_out_and_figures_are_never_cut() -> None:
    rows = [[f"pow:{number} of a long name", *["0.12345"] * 12] for number in range(30)]
    lines = terminal([Section("recall", "q", [], tables=[Table("c", ["kernel", *["accuracy"] * 12], rows)])], 60)
    assert lines[-1] == "(18 more rows and 8 more columns in report.md)"
    shown = [line.split() for line in lines if line.startswith("  pow:")]
    assert len(shown) == 12 and all(cells[-4:] == ["0.12345"] * 4 for cells in shown)
    assert not any("more" in line for line in terminal(sections(), 80))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.text("ab |漢é\x1b\n", max_size=40), max_size=4), max_size=15),
    st.text("ab 漢\u202e", max_size=90),
    st.integers(20, 120),
)
def test_no_line_is_wider_than_the_terminal_or_harms_it(rows: list[list[str]], said: str, width: int) -> None:
    section = Section("speed", said, [said, ""], tables=[Table(said, ["kernel", "a"], rows)])
    for line in terminal([section, section], width):
        assert cell_len(line) <= width and line.isprintable()


@pytest.mark.parametrize("width", [0, 20, 10_000])
def test_any_width_is_taken(width: int) -> None:
    assert terminal(sections(), width) and terminal([], width) == []
