"""Rows on disk, in a spreadsheet, and of several runs together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.attn_compare.specimens import row
from pomona.errors import CheckFailed, DataError
from pomona.methods.attn_compare.results import merge, read_rows, write_csv, write_rows


def _csv(tmp_path: Path, rows: list[dict[str, Any]]) -> pd.DataFrame:
    write_csv(tmp_path / "r.csv", rows)
    return pd.read_csv(tmp_path / "r.csv", dtype=str, keep_default_na=False)


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(TEXTS, FLOATS, st.integers(), st.none() | TEXTS), max_size=5))
def test_rows_survive_the_disk(folder: Path, found: list[tuple[str, float, int, str | None]]) -> None:
    rows = [
        row(point={"name": name, "n": n}, values={"x": value, "list": [value, None]}, reason=reason)
        for name, value, n, reason in found
    ]
    write_rows(folder / "r.jsonl", rows)
    data = (folder / "r.jsonl").read_bytes()
    assert read_rows(data) == rows
    assert [json.loads(line) for line in data.splitlines()] == rows


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("write", [write_rows, write_csv])
def test_a_number_that_is_not_finite_is_refused_and_nothing_is_written(
    tmp_path: Path, value: float, write: Any
) -> None:
    for bad in (
        row(values={"kl": value}),
        row(intervals={"success": [0.1, value]}),
        row(values={"by_head": [[0.1, {"deep": value}]]}),
        row(timing={"seconds": value}),
    ):
        with pytest.raises(CheckFailed, match=r"separation of exp at n=1000, a1=0\.5: .* is -?(nan|inf)"):
            write(tmp_path / "out", [row(), bad])
    assert list(tmp_path.iterdir()) == []


# --- CSV -------------------------------------------------------------------------------------------------------------


def test_columns_are_the_fixed_ones_then_sorted_within_each_part(tmp_path: Path) -> None:
    first = row(values={"z": 1.5, "a": 2, "nested": {"x": True}}, intervals={"z": [1.0, None]})
    frame = _csv(tmp_path, [first, row(reason="too long", status="skipped", values={})])
    assert list(frame) == [
        *("study", "kernel", "status", "reason", "point.a1", "point.n", "values.a", "values.nested.x", "values.z"),
        *("intervals.success.high", "intervals.success.low", "intervals.z.high", "intervals.z.low"),
        *("theory.success", "timing.seconds"),
    ]
    assert frame["intervals.z.low"][0] == "1.0" and frame["intervals.z.high"][0] == ""
    assert frame["values.nested.x"].tolist() == ["true", ""]
    assert frame["reason"].tolist() == ["", "too long"]


def test_the_order_of_rows_and_keys_does_not_move_columns(tmp_path: Path) -> None:
    one, other = row(values={"a": 1, "b": 2}), row("linear", values={"c": 1, "a": 2}, point={"z": 1, "n": 2})
    turned = [dict(reversed(r.items())) for r in (other, one)]
    assert list(_csv(tmp_path, [one, other])) == list(_csv(tmp_path, turned))


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(TEXTS.filter(lambda t: "\0" not in t), FLOATS), min_size=1, max_size=5))
def test_pandas_reads_what_was_written(folder: Path, found: list[tuple[str, float]]) -> None:
    frame = _csv(folder, [row(point={"text": text}, values={"x": x}) for text, x in found])
    assert [float(cell) for cell in frame["values.x"]] == [x for _, x in found]
    quoted = [f"'{text}" if text[:1] in tuple("=+-@\t\r") else text for text, _ in found]
    assert frame["point.text"].tolist() == quoted


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_text_is_a_formula_and_numbers_keep_their_sign(tmp_path: Path, text: str) -> None:
    write_csv(tmp_path / "r.csv", [row(text, point={"file": text}, reason=text, values={"spearman": -0.25})])
    cells = pd.read_csv(tmp_path / "r.csv", dtype=str, keep_default_na=False).iloc[0]
    assert cells["kernel"] == cells["point.file"] == cells["reason"] == f"'{text}"
    assert cells["values.spearman"] == "-0.25"


def test_fields_that_would_share_a_column_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"two fields are called values\.a\.b"):
        write_csv(tmp_path / "r.csv", [row(values={"a.b": 1, "a": {"b": 2}})])


# --- reading ---------------------------------------------------------------------------------------------------------

GOOD = json.dumps(row())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "not JSON"),
        (GOOD[:-5], "not JSON"),
        (GOOD.replace("0.317", "NaN"), "not JSON"),
        (GOOD.replace("0.317", "1e999"), "not JSON"),
        (GOOD.replace("1000", "1" * 30).replace("0.317", "1e999"), "values.success is inf"),
        ("[1]", "not an object"),
        (GOOD.replace('"point"', '"pint"'), '"point" is missing'),
        (GOOD.replace('"theory"', '"theories"'), 'unknown field "theories"'),
        (GOOD.replace("separation", "separate"), "study is none of"),
        (GOOD.replace('"separation"', "[]"), "study is none of"),
        (GOOD.replace("done", "ok"), "status is none of"),
        (GOOD.replace('"done"', "{}"), "status is none of"),
        (GOOD.replace('"exp"', "3"), '"kernel" is not text'),
        (GOOD.replace('"status"', '"reason": 1, "status"'), '"reason" is not text'),
        (GOOD.replace('{"n": 1000, "a1": 0.5}', '"x"'), '"point" is not an object'),
        (GOOD.replace("[0.289, 0.347]", "[0.289]"), "is not [low, high]"),
        (GOOD.replace("[0.289, 0.347]", "[0.289, true]"), "is not [low, high]"),
        (GOOD.replace("0.289", "0.4"), "ends before it begins"),
        ("[" * 100_000, "not JSON"),
        (GOOD.replace("0.317", "[" * 1_000 + "0.1" + "]" * 1_000), "nested too deeply"),
    ],
)
def test_a_malformed_line_is_named(line: str, said: str) -> None:
    assert line != GOOD
    with pytest.raises(DataError) as caught:
        read_rows(f"{GOOD}\n{line}\n{GOOD}\n".encode())
    assert caught.value.message.startswith("line 2: ") and said in caught.value.message


def test_what_is_not_utf8_is_refused_and_the_last_line_break_is_optional() -> None:
    with pytest.raises(DataError, match="line 1"):
        read_rows(GOOD.encode().replace(b"exp", b"\xff"))
    assert read_rows(GOOD.encode()) == read_rows(f"{GOOD}\n".encode()) == [row()]
    assert read_rows(b"") == []


# --- merging ---------------------------------------------------------------------------------------------------------


def test_rows_of_several_runs_follow_each_other_and_equal_ones_are_one() -> None:
    slower = row(timing={"seconds": 9.0}, point={"a1": 0.5, "n": 1000}, reason=None)
    merged = merge([("a", [row(), row("linear")]), ("b", [slower, row("elu1")])])
    assert merged == [row(), row("linear"), row("elu1")]


@pytest.mark.parametrize(
    "changed",
    [
        {"values": {"success": 0.318, "auc": 0.9}},
        {"status": "failed"},
        {"theory": {}},
        {"reason": "r"},
        {"intervals": {}},
    ],
)
def test_rows_that_differ_on_one_point_are_refused_with_both_runs_named(changed: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        merge([("runs/a", [row("linear"), row()]), ("runs/b", [row(**changed)])])
    assert caught.value.message == "runs/a and runs/b differ on separation of exp at n=1000, a1=0.5"


def test_timings_of_one_place_come_from_one_run() -> None:
    def timed(kernel: str, length: int, way: str = "fwd") -> dict[str, Any]:
        return row(kernel, study="speed", point={"pass": way, "length": length, "implementation": f"chunked {kernel}"})

    one = [timed("elu1", 128), timed("elu1", 256)]
    assert merge([("a", one), ("a", one), ("b", [timed("relu", 128, "decode")])]) == [
        *one,
        timed("relu", 128, "decode"),
    ]
    with pytest.raises(DataError, match="a and b both timed pass=fwd") as caught:
        merge([("a", one), ("b", [timed("relu", 512)])])
    assert "in one run" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("study", "first", "second", "message"),
    [
        ("separation", {"part": "base", "seed": 0}, {"part": "base", "seed": 1}, "separation's seed: 0 and 1"),
        ("separation", {"part": "base", "n": 1000}, {"part": "base", "n": 200}, "separation's n: 1000 and 200"),
        ("fidelity", {"source": "x", "layer": 0}, {"source": "y", "layer": 1}, "fidelity's source: x and y"),
        ("fidelity", {"tokens": 8, "layer": 0}, {"tokens": 9, "layer": 1}, "fidelity's tokens: 8 and 9"),
    ],
)
def test_runs_about_different_things_are_not_one_report(study: str, first: Any, second: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        merge([("a", [row(study=study, point=first)]), ("b", [row("elu1", study=study, point=second)])])


def test_points_that_differ_in_anything_are_both_kept() -> None:
    rows = [row(), row(point={"n": 1000, "a1": 0.55}), row("linear"), row(study="fidelity"), row(point={"n": 1000})]
    assert merge([("a", rows)]) == rows and merge([]) == []
