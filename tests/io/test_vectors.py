"""Tables of vectors that other programs read back, number by number, in memory that does not grow."""

from __future__ import annotations

import gc
import gzip
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from faults.storage import room
from pomona.errors import CheckFailed, DataError, OutputError, UsageError
from pomona.io.records import Located, read
from pomona.io.shards import Column, Dtype
from pomona.io.vectors import SUFFIXES, write_table

COLUMNS = [Column("t50_u0r0_p2", 12, {"timestep": 50, "block": "u0r0"}), Column("t90_mid_p1", 5, {"timestep": 90})]
ABOUT = {"model": "digits", "note": "ü"}
ROWS: list[list[dict[str, Any]]] = [
    [{"id": "a", "label": "pear", "n": 1}, {"id": "b", "label": None, "n": 2, "kept": {"x": [1, 2]}}],
    [],
    [{"id": "ü\n", "label": "plum", "n": 0.5, "kept": {"y": "z"}, "late": True}],
]
Frame = Callable[[Path], tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]]


class Pieces:
    """A table in memory; counts how often its vectors are gone through."""

    def __init__(self, rows: list[list[dict[str, Any]]], columns: list[Column]) -> None:
        rng = np.random.default_rng(5)
        self._rows = rows
        self.vectors = [
            {column.name: rng.standard_normal((len(part), column.dims)).astype(np.float32) for column in columns}
            for part in rows
        ]
        self.passes = 0

    def rows(self) -> Iterator[list[dict[str, Any]]]:
        return iter(self._rows)

    def __iter__(self) -> Iterator[tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]]:
        self.passes += 1
        return iter(zip(self._rows, self.vectors, strict=True))


def wanted(pieces: Pieces, dtype: Dtype) -> dict[str, NDArray[Any]]:
    return {
        column.name: np.concatenate([part[column.name] for part in pieces.vectors]).astype(dtype) for column in COLUMNS
    }


def by_pyarrow(path: Path) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    table = pq.read_table(path)
    vectors = {
        column.name: table[column.name].combine_chunks().values.to_numpy().reshape(-1, column.dims)
        for column in COLUMNS
    }
    return table.drop_columns(list(vectors)).to_pylist(), vectors


def by_pandas(path: Path) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    frame = pd.read_parquet(path)
    vectors = {column.name: np.stack(list(frame[column.name])) for column in COLUMNS}
    return [{"id": name} for name in frame["id"]], vectors


def by_datasets(path: Path) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    from datasets import Dataset

    data = Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache"))
    vectors = {}
    for column in COLUMNS:
        feature = data.features[column.name]
        assert feature.length == column.dims  # a list of this many, not of any number
        vectors[column.name] = np.array(data[column.name][:], dtype=feature.feature.dtype)
    return [{"id": name} for name in data["id"]], vectors


def by_numpy(path: Path) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    array = np.load(path)
    sidecar = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert sidecar["shape"] == list(array.shape) and sidecar["dtype"] == str(array.dtype)
    assert sidecar["about"] == ABOUT and sidecar["columns"][0]["timestep"] == 50
    return sidecar["rows"], {c["name"]: array[:, c["start"] : c["stop"]] for c in sidecar["columns"]}


def by_safetensors(path: Path) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    tensors = load_file(path)
    rows = [json.loads(line) for line in tensors.pop("rows.jsonl").tobytes().split(b"\n")[:-1]]
    with safe_open(path, "numpy") as file:
        described = json.loads(file.metadata()["pomona"])
    assert described["about"] == ABOUT and [c["name"] for c in described["columns"]] == [c.name for c in COLUMNS]
    return rows, {column.name: tensors[column.name] for column in COLUMNS}


def by_records(path: Path) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    rows = [item.record for item in read([str(path)]) if isinstance(item, Located)]
    vectors = {column.name: np.array([row.pop(column.name) for row in rows]) for column in COLUMNS}
    return rows, vectors


@pytest.mark.parametrize(
    ("suffix", "frame"),
    [
        (".parquet", by_pyarrow),
        (".parquet", by_pandas),
        (".parquet", by_datasets),
        (".npy", by_numpy),
        (".safetensors", by_safetensors),
        (".jsonl", by_records),
        (".jsonl.gz", by_records),
        (".jsonl.zst", by_records),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_others_read_the_same_numbers_in_the_same_order(
    tmp_path: Path, suffix: str, frame: Frame, dtype: Dtype
) -> None:
    pieces = Pieces(ROWS, COLUMNS)
    write_table(tmp_path / f"a{suffix}", pieces, COLUMNS, dtype=dtype, about=ABOUT)
    rows, vectors = frame(tmp_path / f"a{suffix}")
    assert pieces.passes == 1
    flat = [row for part in ROWS for row in part]
    assert [row["id"] for row in rows] == [row["id"] for row in flat]
    if len(rows[0]) > 1:  # the reader gives all fields; those that a row lacks are null in Parquet
        empty = {"kept": None, "late": None} if suffix == ".parquet" else {}
        for found, was in zip(rows, flat, strict=True):
            filled = {**empty, **was}
            if suffix == ".parquet" and filled["kept"] is not None:
                filled["kept"] = {"x": None, "y": None, **filled["kept"]}
            assert found == filled
    for name, values in wanted(pieces, dtype).items():
        assert np.array_equal(vectors[name].astype(dtype), values), name
        assert vectors[name].dtype == dtype or suffix.startswith(".jsonl")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_table_gives_the_same_bytes_and_nothing_else_is_left(tmp_path: Path, suffix: str) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_table(tmp_path / folder / f"a{suffix}", Pieces(ROWS, COLUMNS), COLUMNS, dtype="float32", about=ABOUT)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("one", "two"))
    assert first == second and set(first) == {f"a{suffix}"} | ({"a.npy.json"} if suffix == ".npy" else set())


def test_parquet_has_typed_lists_a_row_group_for_each_shard_and_says_what_made_it(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", Pieces(ROWS, COLUMNS), COLUMNS, dtype="float16", about=ABOUT)
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert file.schema_arrow.names == ["id", "label", "n", "kept", "late", "t50_u0r0_p2", "t90_mid_p1"]
    assert file.schema_arrow.field("t50_u0r0_p2").type == pa.list_(pa.float16(), 12)
    assert file.schema_arrow.field("n").type == pa.float64()
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [2, 0, 1]
    described = json.loads(file.schema_arrow.metadata[b"pomona"])
    assert described["about"] == ABOUT and described["dtype"] == "float16"
    assert described["columns"][0] == {"timestep": 50, "block": "u0r0", "name": "t50_u0r0_p2", "dims": 12}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_table_without_rows_is_still_one(tmp_path: Path, suffix: str) -> None:
    write_table(tmp_path / f"a{suffix}", Pieces([[]], COLUMNS), COLUMNS, dtype="float32", about=ABOUT)
    if suffix == ".npy":
        assert np.load(tmp_path / "a.npy").shape == (0, 17) and by_numpy(tmp_path / "a.npy")[0] == []
    elif suffix == ".parquet":
        assert pq.read_table(tmp_path / "a.parquet").num_rows == 0
    elif suffix == ".safetensors":
        assert by_safetensors(tmp_path / "a.safetensors")[1]["t50_u0r0_p2"].shape == (0, 12)
    else:
        content = (tmp_path / f"a{suffix}").read_bytes()
        assert (gzip.decompress(content) if suffix.endswith("gz") else content) == b"" or suffix.endswith("zst")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path, suffix: str) -> None:
    pieces = Pieces(ROWS, COLUMNS)
    pieces.vectors[2]["t90_mid_p1"][0, 4] = np.nan
    with pytest.raises(CheckFailed, match="column t90_mid_p1 holds numbers that are not finite"):
        write_table(tmp_path / f"a{suffix}", pieces, COLUMNS, dtype="float32", about=ABOUT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("bytes_left", [0, 40, 20_000])
def test_a_full_disk_leaves_no_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], suffix: str, bytes_left: int
) -> None:
    columns = [Column("a", 20_000, {})]
    pieces = Pieces([[{"id": n}] for n in range(3)], columns)
    with room(bytes_left), pytest.raises(OutputError, match="the file would exceed the size limit") as caught:
        write_table(tmp_path / f"a{suffix}", pieces, columns, dtype="float32", about={})
    assert caught.value.exit_code == 6 and list(tmp_path.iterdir()) == []
    del caught
    gc.collect()
    assert capfd.readouterr() == ("", "")  # what is left behind does not complain


def test_an_old_file_stays_when_the_disk_is_full(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("old")
    with room(40), pytest.raises(OutputError):
        write_table(tmp_path / "a.parquet", Pieces(ROWS, COLUMNS), COLUMNS, dtype="float32", about=ABOUT)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.parquet", "old")]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_field_with_the_name_of_a_column_is_refused(tmp_path: Path, suffix: str) -> None:
    pieces = Pieces([[{"id": "a"}, {"id": "b", "t90_mid_p1": 0}]], COLUMNS)
    with pytest.raises(DataError, match="t90_mid_p1"):
        write_table(tmp_path / f"a{suffix}", pieces, COLUMNS, dtype="float32", about=ABOUT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", ["text", {"x": 1}, 2**70 + 1])
def test_fields_of_two_kinds_are_for_jsonl_and_refused_by_parquet(tmp_path: Path, other: Any) -> None:
    rows = [[{"id": "a", "n": 1}], [{"id": "b", "n": other}]]
    with pytest.raises(OutputError, match="one type per column") as caught:
        write_table(tmp_path / "a.parquet", Pieces(rows, COLUMNS), COLUMNS, dtype="float32", about=ABOUT)
    assert caught.value.hint is not None and ".jsonl" in caught.value.hint and list(tmp_path.iterdir()) == []
    for suffix, frame in ((".jsonl", by_records), (".npy", by_numpy), (".safetensors", by_safetensors)):
        write_table(tmp_path / f"a{suffix}", Pieces(rows, COLUMNS), COLUMNS, dtype="float32", about=ABOUT)
        assert frame(tmp_path / f"a{suffix}")[0] == [row for part in rows for row in part]


def test_names_with_dots_and_commas_are_names_like_others(tmp_path: Path) -> None:
    columns = [Column("a.b", 3, {}), Column("a", 2, {})]
    pieces = Pieces([[{"id": 1, "a.list": {"element": 2}}]], columns)
    for suffix in SUFFIXES:
        write_table(tmp_path / f"a{suffix}", pieces, columns, dtype="float32", about={})
    found = pq.read_table(tmp_path / "a.parquet").to_pylist()[0]
    assert found == {"id": 1, "a.list": {"element": 2}} | {n: v[0].tolist() for n, v in pieces.vectors[0].items()}


def test_another_suffix_is_a_usage_error_that_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.npy"):
        write_table(tmp_path / "a.csv", Pieces(ROWS, COLUMNS), COLUMNS, dtype="float32", about=ABOUT)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".parquet", ".npy", ".safetensors", ".jsonl"])
def test_memory_is_the_same_for_five_times_as_many_shards(tmp_path: Path, suffix: str) -> None:
    """Shards of 1.5 MB: were they held, 100 of them would show."""
    script = f"""
        import resource
        import sys
        from pathlib import Path
        import numpy as np
        from pomona.io.journal import Journal
        from pomona.io.shards import Column, Shards
        from pomona.io.vectors import write_table
        count = int(sys.argv[1])
        columns = [Column("a", 1024, {{}}), Column("b", 512, {{}})]
        journal = Journal(Path(f"journal-{{count}}"), {{}}, resume=False)
        shards = Shards(Path(f"shards-{{count}}"), journal, columns, "float32")
        rng = np.random.default_rng(0)
        for index in range(count):
            rows = [{{"id": f"{{index}}/{{n}}.png", "label": n % 10}} for n in range(256)]
            vectors = {{c.name: rng.standard_normal((256, c.dims), dtype="float32") for c in columns}}
            shards.write(index, rows, vectors, [])
        write_table(Path(f"table-{{count}}{suffix}"), shards, columns, dtype="float32", about={{}})
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    few, many = (
        int(subprocess.check_output([sys.executable, "-c", textwrap.dedent(script), count], cwd=tmp_path))
        for count in ("20", "100")
    )
    assert many <= 1.01 * few, (few, many)
