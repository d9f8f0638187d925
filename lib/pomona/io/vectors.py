"""Tables of rows and their vectors, written shard by shard: memory does not grow with the table.

The suffix picks the layout:

- ``.parquet``: every field of the rows, then a fixed-size list of numbers for each column; `about` and the columns as
  JSON in the schema's metadata under ``pomona``; a row group for each shard.
- ``.npy``: one array of all columns side by side, of shape (rows, all dims); ``NAME.npy.json`` beside it says which
  numbers are which column and holds the rows.
- ``.safetensors``: a tensor for each column, and the rows as JSONL in the tensor of bytes ``rows.jsonl``, because a
  header has a limit and every reader holds it in memory; `about` and the columns are in the metadata.
- ``.jsonl``, also ``.jsonl.gz`` and ``.jsonl.zst``: every field of a row, then a list of numbers for each column.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

import orjson

from pomona.errors import DataError, UsageError
from pomona.io.arrow import as_table, common_schema, fitting
from pomona.io.atomic import atomic_file, writing
from pomona.io.shards import TENSOR_DTYPES, Column, Dtype, Row, as_stored
from pomona.io.tensors import header, tensor_bytes
from pomona.io.writers import compressed, dumps

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Table(Protocol):
    """Rows and vectors in pieces, to be gone through more than once, in the same order; `Shards` is one."""

    def rows(self) -> Iterator[list[Row]]: ...

    def __iter__(self) -> Iterator[tuple[list[Row], dict[str, NDArray[Any]]]]: ...


def write_table(path: Path, table: Table, columns: Sequence[Column], *, dtype: Dtype, about: Mapping[str, Any]) -> None:
    """Write `table` to `path`, and what stands beside it where the layout has such; the bytes depend on these alone.

    Args:
        about: what made the table, as plain JSON.

    Raises:
        CheckFailed: a number is not finite, or not in `dtype`; the message names row and column.
        DataError: a field of the rows has the name of a column.
        OutputError: the disk refuses; or Parquet has no type for a field. No part of the file is left.
        UsageError: the suffix is none of `SUFFIXES`.
    """
    write = next((write for suffix, write in _LAYOUTS.items() if path.name.lower().endswith(suffix)), None)
    if write is None:
        raise UsageError(f"{path.name}: a table ends in {', '.join(SUFFIXES)}")
    content = _Content(table, tuple(columns), dtype, about, _count(table, columns))
    with atomic_file(path) as file, writing(path):
        write(file, content, path)


@dataclass(frozen=True)
class _Content:
    """What is written.

    Attributes:
        count: rows in all of `table`.
    """

    table: Table
    columns: tuple[Column, ...]
    dtype: Dtype
    about: Mapping[str, Any]
    count: int

    def pieces(self) -> Iterator[tuple[list[Row], list[NDArray[Any]]]]:
        """Rows, and the vectors of each column as they are stored."""
        for rows, vectors in self.table:
            yield rows, [as_stored(column, rows, vectors[column.name], self.dtype) for column in self.columns]

    def described(self) -> dict[str, Any]:
        """The table in plain JSON: what made it, and what its columns are."""
        columns = [{**column.about, "name": column.name, "dims": column.dims} for column in self.columns]
        return {"about": dict(self.about), "dtype": self.dtype, "columns": columns}


def _count(table: Table, columns: Sequence[Column]) -> int:
    names = {column.name for column in columns}
    count = 0
    for rows in table.rows():
        count += len(rows)
        if taken := next((name for row in rows for name in row if name in names), None):
            raise DataError(f'field "{taken}" has the name of a column of vectors', hint="rename it in the input")
    return count


def _parquet(file: BinaryIO, content: _Content, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = common_schema(content.table.rows())
    number = pa.from_numpy_dtype(content.dtype)
    vectors = [pa.field(column.name, pa.list_(number, column.dims)) for column in content.columns]
    schema = pa.schema([*fields, *vectors], metadata={"pomona": dumps(content.described())})
    options: dict[str, Any] = {
        "compression": "zstd",
        "use_dictionary": False,
        "use_byte_stream_split": [f"{column.name}.list.element" for column in content.columns],
        "write_statistics": fields.names,
    }
    with fitting(), pq.ParquetWriter(file, schema, **options) as writer:
        for rows, stored in content.pieces():
            lists = [pa.FixedSizeListArray.from_arrays(pa.array(one.reshape(-1)), one.shape[1]) for one in stored]
            writer.write_table(pa.table([*as_table(rows, fields).columns, *lists], schema=schema))


def _npy(file: BinaryIO, content: _Content, path: Path) -> None:
    import numpy as np

    shape = (content.count, sum(column.dims for column in content.columns))
    descr = np.lib.format.dtype_to_descr(np.dtype(content.dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    for _, stored in content.pieces():
        file.write(np.concatenate(stored, axis=1).data)
    described = content.described() | {"shape": shape}
    stop = 0
    for column in described["columns"]:
        column["start"], column["stop"] = stop, (stop := stop + column["dims"])
    with atomic_file(path.with_name(f"{path.name}.json")) as sidecar:
        sidecar.write(json.dumps(described, ensure_ascii=False, allow_nan=False).encode()[:-1] + b', "rows": [')
        between = b"\n"
        for rows in content.table.rows():
            for row in rows:
                sidecar.write(between + dumps(row))
                between = b",\n"
        sidecar.write(b"\n]}\n")


def _safetensors(file: BinaryIO, content: _Content, path: Path) -> None:
    texts = sum(len(dumps(row)) + 1 for rows in content.table.rows() for row in rows)
    number = TENSOR_DTYPES[content.dtype]
    tensors = [(column.name, number, (content.count, column.dims)) for column in content.columns]
    start = header([*tensors, ("rows.jsonl", "U8", (texts,))], {"pomona": dumps(content.described()).decode()})
    file.write(start)
    ends = [len(start)]
    for _, number, shape in tensors:
        ends.append(ends[-1] + tensor_bytes(number, shape))
    for rows, stored in content.pieces():
        for place, values in enumerate(stored):
            file.seek(ends[place])
            file.write(values.data)
            ends[place] += values.nbytes
        file.seek(ends[-1])
        ends[-1] += file.write(b"".join(dumps(row) + b"\n" for row in rows))


def _jsonl(file: BinaryIO, content: _Content, path: Path) -> None:
    packed = compressed(file, path.name.lower())
    target = cast(BinaryIO, packed if packed is not None else file)
    names = [column.name for column in content.columns]
    for rows, stored in content.pieces():
        for row, *lists in zip(rows, *stored, strict=True):
            # integers beyond 64 bits are beyond orjson, arrays beyond json: each writes a half
            vectors = orjson.dumps(dict(zip(names, lists, strict=True)), option=orjson.OPT_SERIALIZE_NUMPY)
            target.write((dumps(row)[:-1] + b"," if row else b"{") + vectors[1:] + b"\n")
    if packed is not None:
        packed.close()


_LAYOUTS: dict[str, Callable[[BinaryIO, _Content, Path], None]] = {
    ".parquet": _parquet,
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".jsonl.zst": _jsonl,
}

SUFFIXES = tuple(_LAYOUTS)
"""Suffixes of the layouts there are."""
