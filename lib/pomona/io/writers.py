"""Writing records in the layout that the output's name asks for."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, Protocol, cast

import orjson

from pomona.errors import OutputError, UsageError
from pomona.io.arrow import as_table, common_schema, fitting
from pomona.io.records import Record, parse

Emit = Literal["auto", "jsonl", "json", "alpaca-json", "csv", "parquet"]


class Writer(Protocol):
    """Takes records one by one; `close` completes the layout but leaves the underlying file open."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def dumps(record: Mapping[str, Any]) -> bytes:
    """One record as strict compact JSON in UTF-8.

    Raises:
        ValueError: the record holds a number that is not finite, or something that is not JSON.
    """
    try:
        line = orjson.dumps(record)
    except TypeError:  # integers beyond 64 bits, or truly not JSON
        return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
    if b"null" in line:  # orjson writes NaN as null without a word
        _refuse_nonfinite(record)
    return line


def _refuse_nonfinite(value: Any) -> None:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        raise ValueError("a number is not finite")
    if isinstance(value, Mapping):
        for part in value.values():
            _refuse_nonfinite(part)
    elif isinstance(value, list | tuple):
        for part in value:
            _refuse_nonfinite(part)


def layout(name: str, emit: Emit) -> Literal["jsonl", "json", "csv", "parquet"]:
    """The layout for an output called `name`, unless `emit` names one."""
    if emit == "alpaca-json":
        return "json"
    if emit != "auto":
        return emit
    stem = name.lower().removesuffix(".gz").removesuffix(".zst")
    for suffix, kind in ((".json", "json"), (".csv", "csv"), (".parquet", "parquet")):
        if stem.endswith(suffix):
            return cast(Literal["json", "csv", "parquet"], kind)
    return "jsonl"


def open_writer(file: BinaryIO, name: str, emit: Emit = "auto") -> Writer:
    """A writer onto `file`; `name` decides layout (`.jsonl .json .csv .parquet`) and compression (`.gz .zst`)."""
    kind = layout(name, emit)
    packed = compressed(file, name)
    target = cast(BinaryIO, packed if packed is not None else file)
    writer: Writer
    if kind == "json":
        writer = _JsonWriter(target)
    elif kind == "csv":
        writer = _CsvWriter(target)
    elif kind == "parquet":
        if packed is not None:
            raise UsageError(f"{name}: Parquet is compressed inside; leave out the suffix {Path(name).suffix}")
        writer = _ParquetWriter(target)
    else:
        writer = _JsonlWriter(target)
    return _Packed(writer, packed) if packed is not None else writer


def compressed(file: BinaryIO, name: str) -> Any | None:
    """A stream onto `file` that compresses as the suffix of `name` says (`.gz .zst`); its end is written by `close`."""
    if name.endswith(".gz"):
        # no name and no time in the header, so that the same records give the same bytes
        return gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0)
    if name.endswith(".zst"):
        import pyarrow as pa

        return pa.CompressedOutputStream(_Unclosed(file), "zstd")
    return None


class _JsonlWriter:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, record: Record) -> None:
        self._file.write(dumps(record) + b"\n")

    def close(self) -> None:
        return None


class _JsonWriter:
    """The layout of the Alpaca files: an indented array in ASCII, without a newline at the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._between = b"[\n    "

    def write(self, record: Record) -> None:
        text = json.dumps(record, indent=4, allow_nan=False).replace("\n", "\n    ")
        self._file.write(self._between + text.encode("ascii"))
        self._between = b",\n    "

    def close(self) -> None:
        self._file.write(b"[]" if self._between.startswith(b"[") else b"\n]")


class _CsvWriter:
    """The first record's keys are the header; what is not text or a number is written as JSON."""

    def __init__(self, file: BinaryIO) -> None:
        self._text = io.TextIOWrapper(cast(BinaryIO, _Unclosed(file)), encoding="utf-8", newline="", write_through=True)
        self._rows: csv.DictWriter[str] | None = None

    def write(self, record: Record) -> None:
        if self._rows is None:
            self._rows = csv.DictWriter(self._text, list(record), lineterminator="\n")
            self._rows.writeheader()
        cells = {k: v if isinstance(v, str | int | float) else _cell(v) for k, v in record.items()}
        try:
            self._rows.writerow(cells)
        except ValueError as error:
            raise OutputError(
                f"CSV has one header for all: {error}", hint="write .jsonl, which keeps every field"
            ) from error

    def close(self) -> None:
        self._text.flush()


def _cell(value: Any) -> str:
    return "" if value is None else dumps(value).decode("utf-8")


class _ParquetWriter:
    """Parquet needs one schema for all rows, so rows wait on disk until it is known."""

    _ROWS = 4096

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._spool: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()

    def write(self, record: Record) -> None:
        self._spool.write(dumps(record) + b"\n")

    def _pieces(self) -> Iterator[list[Record]]:
        self._spool.seek(0)
        while lines := list(itertools.islice(self._spool, self._ROWS)):
            yield [parse(line) for line in lines]

    def close(self) -> None:
        import pyarrow.parquet as pq

        try:
            schema = common_schema(self._pieces())
            with fitting(), pq.ParquetWriter(self._file, schema, compression="zstd") as writer:
                for rows in self._pieces():
                    writer.write_table(as_table(rows, schema))
        finally:
            self._spool.close()


class _Unclosed(io.RawIOBase):
    """Keeps a wrapper from closing the file below it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._file.closed:  # Arrow ends an abandoned stream when it is collected, and complains where it cannot
            return memoryview(data).nbytes
        return self._file.write(data)


class _Packed:
    """A writer whose compressed stream must be finished too."""

    def __init__(self, writer: Writer, packed: Any) -> None:
        self._writer = writer
        self._packed = packed

    def write(self, record: Record) -> None:
        self._writer.write(record)

    def close(self) -> None:
        self._writer.close()
        self._packed.close()


def brief(value: Any) -> Any:
    """`value` with its numbers to six digits, as a summary needs them."""
    if isinstance(value, Mapping):
        return {name: brief(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [brief(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
