"""Reading: every layout gives the same records, and what is not a record is named with its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.errors import DataError, MissingError, UsageError
from pomona.io.records import Digest, Located, Reject, read

RECORDS = [
    {"instruction": "Name a colour.", "input": "", "output": "Grün, « vert », 緑 🍏"},
    {"instruction": "Add.", "input": "1, 2", "output": 'Three: "3",\nsaid twice.'},
]


def records(path: Path, **options: object) -> list[dict[str, object]]:
    found = list(read([str(path)], **options))  # type: ignore[arg-type]
    assert all(isinstance(item, Located) for item in found), found
    return [item.record for item in found if isinstance(item, Located)]


def jsonl(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_layouts(folder: Path) -> list[Path]:
    text = io.StringIO()
    rows = csv.DictWriter(text, ["instruction", "input", "output"])
    rows.writeheader()
    rows.writerows(RECORDS)
    (folder / "a.jsonl").write_bytes(jsonl(RECORDS))
    (folder / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(RECORDS))
    (folder / "crlf.jsonl").write_bytes(jsonl(RECORDS).replace(b"\n", b"\r\n"))
    (folder / "no_final_newline.jsonl").write_bytes(jsonl(RECORDS).rstrip(b"\n"))
    (folder / "a.json").write_text(json.dumps(RECORDS, indent=4))
    (folder / "compact.json").write_text(json.dumps(RECORDS, separators=(",", ":"), ensure_ascii=False))
    (folder / "lines.json").write_bytes(jsonl(RECORDS))
    (folder / "a.csv").write_text(text.getvalue(), encoding="utf-8")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(RECORDS)))
    (folder / "a.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS).encode()))
    (folder / "named_wrongly.txt").write_bytes(gzip.compress(jsonl(RECORDS)))
    with pa.CompressedOutputStream(str(folder / "a.jsonl.zst"), "zstd") as packed:
        packed.write(jsonl(RECORDS))
    pq.write_table(pa.Table.from_pylist(RECORDS), folder / "a.parquet")
    return sorted(folder.iterdir())


def test_every_layout_gives_the_same_records(tmp_path: Path) -> None:
    for path in write_layouts(tmp_path):
        assert records(path) == RECORDS, path.name


def test_a_saved_dataset_directory_is_an_input(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "saved"))
    assert records(tmp_path / "saved") == RECORDS


def test_a_hub_id_without_a_network_is_missing_not_a_traceback(pomona, tmp_path: Path) -> None:
    done = pomona("alpagasus-filter", "hf:nobody/nothing", "--judge", "local")
    assert done.returncode == 5, done.stderr
    assert b"nobody/nothing" in done.stderr


def test_the_digest_is_of_the_bytes_on_disk(tmp_path: Path) -> None:
    import hashlib

    for path in write_layouts(tmp_path):
        digests: list[Digest] = []
        list(read([str(path)], digests=digests))
        assert digests[0].as_dict() == {
            "source": str(path),
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b'{"a": NaN}', "NaN and Infinity are not JSON"),
        (b'{"a": -Infinity}', "NaN and Infinity are not JSON"),
        (b'{"a": 12345678901234567890, "b": NaN}', "NaN"),
        (b'{"a": "\\ud800"}', "not JSON"),
        (b'{"a": "\xff\xfe"}', "not UTF-8 at byte 22"),
        (b'{"a": "\x00"}', "not JSON"),
        (b"[1, 2]", "a JSON list, not an object"),
        (b'"text"', "a JSON str, not an object"),
        (b"{'a': 1}", "not JSON"),
        (b"{} {}", "not JSON"),
    ],
)
def test_a_bad_line_is_a_reject_with_its_place_and_the_rest_is_read(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"before": 1}\n\n' + line + b'\n{"after": 2}\n')
    before, bad, after = read([str(path)])
    assert isinstance(before, Located) and before.line == 1
    assert isinstance(bad, Reject) and bad.line == 3 and reason in bad.reason, bad
    assert isinstance(after, Located) and after.record == {"after": 2}


def test_integers_of_any_size_keep_their_value(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    path.write_text('{"id": 123456789012345678901234567890, "small": -9223372036854775808}\n')
    assert records(path) == [{"id": 123456789012345678901234567890, "small": -9223372036854775808}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": }]', "element 2: not JSON"),
        ('[{"a": 1}, {"a": 2}', "breaks off after element 2"),
        ('[{"a": 1} {"a": 2}]', "breaks off after element 1"),
        ('[{"a": 1}] tail', "text after the end"),
        ('[{"a": NaN}]', "NaN is not JSON"),
        ('[{"a": "\udcff"}]', "not UTF-8"),
    ],
)
def test_a_damaged_array_is_bad_data(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message):
        list(read([str(path)]))


def test_array_elements_that_are_no_objects_are_rejects(tmp_path: Path) -> None:
    path = tmp_path / "mixed.json"
    path.write_text('[1, {"a": 1}, "x", 2.5]')
    kinds = [type(item) for item in read([str(path)])]
    assert kinds == [Reject, Located, Reject, Reject]


@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=8),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                max_leaves=6,
            ),
            max_size=4,
        ),
        max_size=5,
    ),
    st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz", "a.json.zst"]),
)
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, rows: list[dict], name: str) -> None:
    from pomona.io.writers import open_writer

    path = tmp_path_factory.mktemp("round") / name
    with path.open("wb") as file:
        writer = open_writer(file, name)
        for row in rows:
            writer.write(row)
        writer.close()
    assert records(path) == rows


def test_every_truncation_of_a_file_is_read_or_rejected_never_lost(tmp_path: Path) -> None:
    data = jsonl(RECORDS)
    first = len(jsonl(RECORDS[:1]))
    path = tmp_path / "cut.jsonl"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        items = list(read([str(path)]))
        whole = (length >= first - 1) + (length >= len(data) - 1)
        assert sum(isinstance(item, Located) for item in items) == whole
        torn = data[:length].rsplit(b"\n", 1)[-1]
        assert sum(isinstance(item, Reject) for item in items) == (torn != b"" and whole < (length > first) + 1)


def test_a_line_over_the_limit_is_rejected_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    long = b'{"a": "' + b"x" * 100 + b'"}\n'
    path.write_bytes(long + b'{"b": 1}\n')
    bad, good = read([str(path)], max_record_bytes=50)
    assert isinstance(bad, Reject) and "longer than 50 bytes" in bad.reason
    assert isinstance(good, Located) and good.line == 2
    (only, _) = read([str(path)], max_record_bytes=len(long) - 1)
    assert isinstance(only, Located)


def test_a_compressed_bomb_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(b" " * 2**20)
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from pomona.io.records import read\n"
        "items = list(read([sys.argv[1]]))\n"
        "assert len(items) == 1 and 'longer than' in items[0].reason, items\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True)
    assert int(done.stdout) * 1024 < 250 * 2**20


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_compressed_data_that_breaks_off_is_bad_data(tmp_path: Path, name: str) -> None:
    write_layouts(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="damaged or cut off"):
        list(read([str(path)]))


def test_a_damaged_parquet_file_is_bad_data(tmp_path: Path) -> None:
    write_layouts(tmp_path)
    path = tmp_path / "a.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="Parquet"):
        list(read([str(path)]))


def test_csv_rows_of_another_width_are_rejects(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n1,2,3\n4,5\n")
    kinds = [(type(item), item.line) for item in read([str(path)])]
    assert kinds == [(Located, 2), (Reject, 3), (Located, 4)]


def test_an_empty_file_holds_no_record(tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", b""),
        ("b.jsonl", b"\n \n"),
        ("c.json", b"[]"),
        ("d.json", b" [ ] \n"),
        ("e.csv", b""),
    ):
        (tmp_path / name).write_bytes(content)
        assert records(tmp_path / name) == []


def test_a_missing_file_names_a_near_one(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").touch()
    with pytest.raises(MissingError) as caught:
        list(read([str(tmp_path / "recrods.jsonl")]))
    assert "records.jsonl" in (caught.value.hint or "")


def test_a_directory_of_splits_asks_for_one(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(RECORDS)}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UsageError, match="several splits"):
        list(read([str(tmp_path / "saved")]))


def test_half_of_a_surrogate_pair_is_no_text_in_any_layout(tmp_path: Path) -> None:
    whole, half = {"a": "\U0001f350"}, {"a": ["x", {"b": "\ud83c"}]}
    (tmp_path / "a.json").write_text(json.dumps([whole, half, whole]))
    (tmp_path / "a.jsonl").write_text(
        f"{json.dumps(whole)}\n{json.dumps({**half, 'n': 10**20})}\n{json.dumps(whole)}\n"
    )
    for name in ("a.json", "a.jsonl"):
        first, second, third = read([str(tmp_path / name)])
        assert isinstance(first, Located) and first.record == whole and isinstance(third, Located)
        assert isinstance(second, Reject) and second.line == 2 and "surrogate" in second.reason


def test_what_is_nested_too_deeply_is_bad_data(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "a.json").write_text(f"[{deep}]")
    with pytest.raises(DataError, match="element 1: nested too deeply"):
        list(read([str(tmp_path / "a.json")]))
    (tmp_path / "a.jsonl").write_text(f'{{"n": {10**20}, "a": {deep}}}\n{{"a": {deep}}}\n')
    assert [isinstance(item, Reject) for item in read([str(tmp_path / "a.jsonl")])] == [True, True]


def test_a_parquet_file_of_large_values_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    values = [os.urandom(2**18) for _ in range(4)]
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema({"image": pa.binary()})) as writer:
        for _ in range(40):
            writer.write_table(pa.table({"image": values}))
    digests: list[Digest] = []
    before, largest = pa.total_allocated_bytes(), 0
    for number, item in enumerate(read([str(tmp_path / "a.parquet")], digests=digests), 1):
        largest = max(largest, pa.total_allocated_bytes() - before)
        assert isinstance(item, Located) and item.record["image"] == values[(number - 1) % 4]
    assert number == 160
    assert largest < 20 * 2**20
    assert digests[0].size == (tmp_path / "a.parquet").stat().st_size
