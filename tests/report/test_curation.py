"""What a report says of a selection."""

from __future__ import annotations

import random
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.report.curation import CurationReport
from pomona.report.text import escape


def _record(instruction: str = "Ask", output: str = "Answer", **objects: Any) -> dict[str, Any]:
    return {"instruction": instruction, "input": "", "output": output, **objects}


def _rated(score: float | None, ifd: float | None = None, name: str = "Ask") -> dict[str, Any]:
    more: dict[str, Any] = {} if ifd is None else {"ifd": {"ifd": ifd, "status": "ok"}}
    return _record(name, alpagasus={"score": score, "dimension": "accuracy", "status": "ok"}, **more)


def _report(count: int = 200) -> CurationReport:
    generator = random.Random(3)
    report = CurationReport(title="A test", threshold=4.5)
    for number in range(count):
        score = generator.randrange(11) / 2
        kept = score >= 4.5
        record = _rated(score, generator.random() * 1.4, f"Question {number}")
        report.add(record, kept, None if kept else "below threshold")
    report.add(_rated(None), False, "unparsed")
    report.set_aside("not JSON", 3)
    return report


def _png_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_every_record_is_in_the_counts(tmp_path: Path) -> None:
    report = _report()
    assert report.total == 204 == report.kept + report.dropped.total()
    report.write(tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text()
    assert "| in | 204 | 100.0% |" in text
    assert f"| **kept** | {report.kept} |" in text
    assert "| dropped: not JSON | 3 | 1.5% |" in text
    assert report.summary_lines()[0].startswith(f"204 in, {report.kept} kept")


def test_the_report_shows_its_plots_and_they_are_real(tmp_path: Path) -> None:
    _report().write(tmp_path / "my report.md")
    names = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", (tmp_path / "my report.md").read_text())
    assert names == [f"my%20report-{kind}.png" for kind in ("ratings", "ifd")]
    for kind in ("ratings", "ifd"):
        width, height = _png_size((tmp_path / f"my report-{kind}.png").read_bytes())
        assert width > 900 and height > 200


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _report().write(tmp_path / name / "r.md")
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["r-ifd.png", "r-ratings.png", "r.md"]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_only_plots_with_something_to_show_are_made(tmp_path: Path) -> None:
    CurationReport(title="none").write(tmp_path / "empty.md")
    report = CurationReport(title="ifd only")
    report.add({**_record(), "ifd": {"ifd": 0.5}}, True)
    report.write(tmp_path / "ifd.md")
    assert sorted(p.name for p in tmp_path.iterdir()) == [*("empty.md", "ifd-ifd.png", "ifd.md")]
    assert "Misaligned" not in (tmp_path / "ifd.md").read_text()


def test_hardest_and_misaligned_are_parted_at_one_and_ordered() -> None:
    report = CurationReport(title="t")
    values = [0.3, 1.0, 0.9, 1.0001, 5.0, 0.95, 0.95, 0.2, 0.8, 1.2, 1.3, 1.4, 1.5, None]
    for number, value in enumerate(values):
        report.add(_rated(4.0, value, f"q{number}"), True)
    assert [e.ifd for e in report.hardest()] == [1.0, 0.95, 0.95, 0.9, 0.8]
    assert [e.instruction for e in report.hardest()][1:3] == ["q5", "q6"]
    assert [e.ifd for e in report.misaligned()] == [5.0, 1.5, 1.4, 1.3, 1.2]


def test_of_equal_scores_the_earlier_records_are_shown() -> None:
    report = CurationReport(title="t")
    for number in range(9):
        report.add(_rated(4.0, 0.5, f"q{number}"), True)
    assert [e.instruction for e in report.hardest()] == ["q0", "q1", "q2", "q3", "q4"]


@pytest.mark.parametrize("score", [None, float("nan"), float("inf"), True, "0.5", 10**400])
def test_what_is_no_finite_number_is_no_score(score: Any) -> None:
    report = CurationReport(title="t")
    report.add({"instruction": "a", "output": "b", "ifd": {"ifd": score}, "alpagasus": {"score": score}}, True)
    report.add({"ifd": 0.5, "alpagasus": None}, True)
    assert report.hardest() == [] and len(report.summary_lines()) == 2


HOSTILE = [
    "a | b\n| c",
    "`code` ``` fence",
    "<script>alert(1)</script> &amp;",
    "line\r\none\u2028two\x85",
    "\x1b[31mred\x07\x00",
    "[link](javascript:x) ![i](http://e.org/x.png) https://e.org www.e.org a@b.org",
    "\u202eright to left\u200b",
    "\ud800 lone",
    "# heading\n---\n* item",
    "$\\alpha$ ~~x~~ __b__",
    "x" * 100_000,
    "\n" * 100_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_one_harmless_cell(tmp_path: Path, text: str) -> None:
    report = CurationReport(title=text[:50])
    record = {"instruction": text, "input": text, "output": text, "ifd": {"ifd": 0.5}}
    report.add({**record, "alpagasus": {"score": 1.0, "dimension": text}}, False, text[:300])
    report.write(tmp_path / "r.md")
    lines = (tmp_path / "r.md").read_text(encoding="utf-8").split("\n")
    row = next(line for line in lines if line.startswith("| 0.500"))
    assert row.count("|") == 6 and len(row) < 1500
    for cell in row.split("|")[4:6]:
        assert not re.search(r"[`<>$*_\[\]]|://|www\.|@", cell)
        assert cell.isprintable()
    assert not any(set(line) & set("\x00\x07\x1b\u202e\u200b\ufeff") for line in lines)
    for line in report.summary_lines():
        assert line.isprintable() and len(line) <= 100


@settings(max_examples=60)
@given(st.text(max_size=300))
def test_escaped_text_holds_no_markup(text: str) -> None:
    escaped = re.sub(r"&#\d+;", "", escape(text))
    assert not set(escaped) & set("&<>|`@$\\*_[]~{}#")


def test_chat_records_show_their_last_turn() -> None:
    messages = [
        *({"role": "user", "content": "first"}, {"role": "assistant", "content": "one"}),
        *({"role": "user", "content": "second"}, {"role": "assistant", "content": "two"}),
    ]
    report = CurationReport(title="t")
    report.add({"messages": messages, "ifd": {"ifd": 0.4}}, True)
    (example,) = report.hardest()
    assert (example.instruction, example.answer) == ("second", "two")


def test_the_terminal_summary_has_bars_in_proportion() -> None:
    report = CurationReport(title="t")
    for score, count in ((4.0, 80), (4.5, 20), (5.0, 1)):
        for _ in range(count):
            report.add(_rated(score), score >= 4.5, None if score >= 4.5 else "below threshold")
    lines = report.summary_lines()
    assert "ratings (accuracy)" in lines
    bars = {line.split()[0]: line.count("█") for line in lines[lines.index("ratings (accuracy)") + 1 :] if line}
    assert bars["4"] >= 50 and abs(bars["4"] - 4 * bars["4.5"]) <= 4
    assert any(line.split()[:2] == ["5", "1"] and line.endswith(tuple("▏▎▍▌▋▊▉█")) for line in lines)
