"""Writing: layouts that other programs read, strict JSON, nothing lost on the way."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pomona.errors import OutputError, UsageError
from pomona.io.writers import dumps, open_writer

ROWS = [
    {"instruction": "a", "n": 1, "ifd": {"ifd": 0.5, "status": "ok"}},
    {"instruction": "ü\n😀", "n": 2, "ifd": {"ifd": None, "status": "empty_answer"}},
]


def written(name: str, rows: list[dict[str, object]], emit: str = "auto") -> bytes:
    file = io.BytesIO()
    writer = open_writer(file, name, emit)  # type: ignore[arg-type]
    for row in rows:
        writer.write(row)
    writer.close()
    return file.getvalue()


def test_json_is_the_layout_of_the_alpaca_files() -> None:
    assert written("a.json", ROWS) == json.dumps(ROWS, indent=4).encode("ascii")
    assert written("a.json", []) == b"[]"


@pytest.mark.parametrize("name", ["random_9k", "claude_t45", "dolly_3k"])
def test_loading_and_emitting_a_published_file_is_byte_identical(name: str, shared) -> None:
    from pomona.io.records import Located, read

    path = shared(f"data/alpaca/{name}.json")
    rows = [item.record for item in read([str(path)]) if isinstance(item, Located)]
    assert written("a.json", rows, "alpaca-json") == path.read_bytes()


def test_csv_holds_nested_values_as_json() -> None:
    rows = list(csv.DictReader(io.StringIO(written("a.csv", ROWS).decode("utf-8"), newline="")))
    assert rows[1]["instruction"] == "ü\n😀"
    assert json.loads(rows[1]["ifd"]) == ROWS[1]["ifd"]


def test_csv_refuses_a_field_its_header_lacks() -> None:
    with pytest.raises(OutputError, match="header"):
        written("a.csv", [{"a": 1}, {"a": 1, "b": 2}])


def test_parquet_finds_one_schema_for_all_rows(tmp_path: Path) -> None:
    rows = [{"a": None, "b": {"x": 1}}] * 5000 + [{"a": "text", "b": {"x": 1.5, "y": "z"}}]
    (tmp_path / "a.parquet").write_bytes(written("a.parquet", rows))
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert len(table) == 5001
    assert table[0] == {"a": None, "b": {"x": 1.0, "y": None}}
    assert table[-1] == {"a": "text", "b": {"x": 1.5, "y": "z"}}


def test_parquet_keeps_fields_that_only_later_records_have(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"a": 1}, {"b": 2, "a": 3}, {}]
    (tmp_path / "a.parquet").write_bytes(written("a.parquet", rows))
    found = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert found == [{"a": 1, "b": None}, {"a": 3, "b": 2}, {"a": None, "b": None}]


def test_parquet_refuses_columns_of_two_kinds() -> None:
    with pytest.raises(OutputError, match="one type per column"):
        written("a.parquet", [{"a": 1}, {"a": {"x": 1}}])


def test_parquet_is_not_compressed_twice() -> None:
    with pytest.raises(UsageError):
        written("a.parquet.gz", ROWS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.csv"])
def test_the_same_records_give_the_same_bytes(name: str) -> None:
    assert written(name, ROWS) == written(name, ROWS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_never_written(value: float) -> None:
    for name in ("a.jsonl", "a.json"):
        with pytest.raises(ValueError):
            written(name, [{"ok": None, "deep": [{"x": value}]}])


def test_null_is_written() -> None:
    assert dumps({"a": None, "b": [None, 1.5]}) == b'{"a":null,"b":[null,1.5]}'


def test_integers_beyond_64_bits_are_written_whole() -> None:
    assert dumps({"a": 2**70}) == b'{"a":1180591620717411303424}'
