"""Reading records, one at a time and in order, from any of the layouts people keep them in.

JSONL, JSON arrays, CSV, Parquet, saved `datasets` directories and hub ids, plain or compressed, from files or standard
input. Memory is bounded by the longest record, not by the file. What cannot be read as a record is yielded as a
`Reject` with its place and reason, so that nothing disappears.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import orjson

from pomona.errors import DataError, MissingError, UsageError

Record = dict[str, Any]
Format = Literal["auto", "jsonl", "json", "csv", "parquet", "dataset"]

MAX_RECORD_BYTES = 64 * 2**20
_CHUNK = 2**20
_BATCH = 2**23  # bytes of Parquet made into records at a time
_BIG_INTEGER = re.compile(rb"\d{19}")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"


@dataclass(frozen=True, slots=True)
class Located:
    """A record and where it came from: `line` counts from 1 and is a line, a row or an array element."""

    record: Record
    source: str
    line: int


@dataclass(frozen=True, slots=True)
class Reject:
    """Something that is not a record; `raw` is its beginning, for people."""

    reason: str
    source: str
    line: int
    raw: str = ""


@dataclass(slots=True)
class Digest:
    """SHA-256 and size of the bytes read so far from one source."""

    source: str
    size: int
    sha256: Any

    def update(self, data: bytes) -> None:
        self.size += len(data)
        self.sha256.update(data)

    def as_dict(self) -> dict[str, Any]:
        return {"source": self.source, "bytes": self.size, "sha256": self.sha256.hexdigest()}


def read(
    inputs: Sequence[str],
    *,
    format: Format = "auto",
    max_record_bytes: int = MAX_RECORD_BYTES,
    digests: list[Digest] | None = None,
) -> Iterator[Located | Reject]:
    """Every record of `inputs`, in order; ``-`` is standard input.

    An input is a file, a directory saved by `datasets`, or ``hf:NAME[:SPLIT]``. The layout of a file is told from its
    suffix and, where that says nothing, from its first byte; gzip and zstd are told from their magic numbers.

    Args:
        digests: filled with one digest per file, complete once the iterator is exhausted.

    Raises:
        MissingError: an input does not exist or cannot be read.
        DataError: a file breaks off or is damaged as a whole (compressed data, Parquet).
    """
    for name in inputs:
        if name.startswith("hf:"):
            yield from _dataset_id(name)
        elif name != "-" and Path(name).is_dir():
            yield from _dataset_directory(Path(name))
        else:
            yield from _file(name, format, max_record_bytes, digests)


def _file(name: str, format: Format, limit: int, digests: list[Digest] | None) -> Iterator[Located | Reject]:
    source = "standard input" if name == "-" else name
    try:
        # Python's own stdin object aborts the interpreter when a thread still waits in it at the end.
        raw: BinaryIO = open(0 if name == "-" else name, "rb", closefd=name != "-")  # noqa: SIM115
    except FileNotFoundError as error:
        raise MissingError(f"{name}: no such file", hint=near(Path(name))) from error
    except OSError as error:
        raise MissingError(f"{name}: {error.strerror}") from error
    digest = Digest(source, 0, hashlib.sha256())
    if digests is not None:
        digests.append(digest)
    with raw:
        hashing = _Hashing(raw, digest)
        stream = io.BufferedReader(hashing, _CHUNK)
        try:
            head = stream.peek(4)
            plain = _decompressed(stream, head)
            start = plain.peek(4096)
            kind = format if format != "auto" else _layout(name, start)
            if kind == "parquet" and plain is stream and is_regular(name):
                yield from _rows(name, source)
            else:
                yield from _LAYOUTS[kind](plain, source, limit)
            while rest := raw.read(_CHUNK):  # what the layout did not need still counts in the digest
                digest.update(rest)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{source}: the compressed data is damaged or cut off: {error}") from error
        except IsADirectoryError as error:
            raise MissingError(f"{name}: it is a directory") from error
        except OSError as error:
            if type(error) is OSError and error.errno is None:  # how pyarrow reports damaged zstd data
                raise DataError(f"{source}: the compressed data is damaged or cut off: {error}") from error
            raise MissingError(f"{source}: {error.strerror or error}") from error


class _Hashing(io.RawIOBase):
    """A raw stream that keeps a digest of all that passes."""

    def __init__(self, raw: BinaryIO, digest: Digest) -> None:
        self._raw = raw
        self._digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # read1 returns what a pipe holds now instead of waiting for a full buffer
        read1: Callable[[int], bytes] = getattr(self._raw, "read1", self._raw.read)
        data = read1(len(buffer))
        buffer[: len(data)] = data
        self._digest.update(data)
        return len(data)


def _decompressed(stream: Any, head: bytes) -> io.BufferedReader:
    if head.startswith(_GZIP):
        return io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=stream, mode="rb")), _CHUNK)
    if head.startswith(_ZSTD):
        import pyarrow as pa

        return io.BufferedReader(cast(Any, pa.CompressedInputStream(stream, "zstd")), _CHUNK)
    return cast(io.BufferedReader, stream)


def _layout(name: str, start: bytes) -> Format:
    stem = Path(name).name.lower()
    for suffix in (".gz", ".zst"):
        stem = stem.removesuffix(suffix)
    if start.startswith(_PARQUET):
        return "parquet"
    if stem.endswith((".csv", ".tsv")):
        return "csv"
    return "json" if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[" else "jsonl"


def _jsonl(stream: io.BufferedReader, source: str, limit: int) -> Iterator[Located | Reject]:
    number = offset = 0
    while line := stream.readline(limit + 2):
        number += 1
        start, offset = offset, offset + len(line)
        if len(line) > limit + 1 or (len(line) == limit + 1 and not line.endswith(b"\n")):
            head = line[:80]
            while line and not line.endswith(b"\n"):
                line = stream.readline(_CHUNK)
                offset += len(line)
            yield Reject(f"longer than {limit} bytes (--max-record-bytes)", source, number, _shown(head))
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.isspace():
            continue
        try:
            value = parse(line)
        except ValueError as error:
            yield Reject(_why(line, error, start), source, number, _shown(line))
            continue
        yield _located(value, source, number)


def _encodes(value: Any) -> bool:
    """Whether the texts in `value` are Unicode; Python's decoder lets halves of pairs pass."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def parse(line: bytes) -> Any:
    """Strict JSON: no NaN, no lone surrogates; integers of any size keep their value."""
    if _BIG_INTEGER.search(line):  # beyond 64 bits orjson would read a float
        try:
            value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not _encodes(value):
            raise ValueError("half of a surrogate pair")
        return value
    return orjson.loads(line)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _why(line: bytes, error: ValueError, start: int) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as bad:
        return f"not UTF-8 at byte {start + bad.start}"
    if re.search(rb"[:\[,]\s*-?(NaN|Infinity)\b", line):
        return "NaN and Infinity are not JSON"
    return f"not JSON: {str(error).splitlines()[0]}"


def _located(value: Any, source: str, number: int) -> Located | Reject:
    if isinstance(value, dict):
        return Located(value, source, number)
    return Reject(f"a JSON {type(value).__name__}, not an object", source, number, _shown(repr(value).encode()))


def _json(stream: io.BufferedReader, source: str, limit: int) -> Iterator[Located | Reject]:
    """Elements of one JSON array, decoded as the text arrives."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="strict", newline="")
    buffer, position, number, ended = "", 0, 0, False

    def fill() -> None:
        nonlocal buffer, position, ended
        more = text.read(max(_CHUNK, len(buffer) - position))
        ended = not more
        buffer, position = buffer[position:] + more, 0

    def next_mark() -> str:
        """The next character that is not white space, left unread; empty at the end."""
        nonlocal position
        while True:
            position = _SPACE.match(buffer, position).end()  # type: ignore[union-attr]  # the pattern matches anything
            if position < len(buffer) or ended:
                return buffer[position : position + 1]
            fill()

    try:
        if next_mark() != "[":
            raise DataError(f"{source}: not a JSON array", hint="use --input-format jsonl for one object per line")
        while True:
            position += 1  # the bracket or the comma
            if next_mark() == "]" and number == 0:
                break
            while True:
                try:
                    value, end = decoder.raw_decode(buffer, position)
                except ValueError as error:
                    if ended or len(buffer) - position > limit:
                        # An array has no line to skip to, so what follows cannot be trusted either.
                        why = f"not JSON: {error}" if ended else f"longer than {limit} bytes (--max-record-bytes)"
                        raise DataError(f"{source}: element {number + 1}: {why}") from error
                    end = len(buffer)
                if end < len(buffer) or ended:  # a number at the end of the buffer could go on
                    break
                fill()
            start, position = position, end
            number += 1
            if _SURROGATE.search(buffer, start, end) and not _encodes(value):
                yield Reject("not JSON: half of a surrogate pair", source, number)
            else:
                yield _located(value, source, number)
            mark = next_mark()
            if mark == "]":
                break
            if mark != ",":
                raise DataError(f"{source}: the array breaks off after element {number}")
        position += 1
        if next_mark():
            raise DataError(f"{source}: there is text after the end of the array")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: after element {number}: not UTF-8 ({error.reason})") from error
    except RecursionError as error:
        raise DataError(f"{source}: element {number + 1}: nested too deeply") from error


def _csv(stream: io.BufferedReader, source: str, limit: int) -> Iterator[Located | Reject]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="strict", newline="")
    csv.field_size_limit(limit)
    delimiter = "\t" if source.removesuffix(".gz").removesuffix(".zst").endswith(".tsv") else ","
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    number = 1
    try:
        header = next(rows, None)
        if header is None:
            return
        for number, row in enumerate(rows, 2):
            if len(row) == len(header):
                yield Located(dict(zip(header, row, strict=True)), source, number)
            elif row:
                yield Reject(f"{len(row)} cells under a header of {len(header)}", source, number, ",".join(row)[:80])
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: after row {number}: not UTF-8 ({error.reason})") from error
    except csv.Error as error:
        raise DataError(f"{source}: row {number + 1}: {error}") from error


def _parquet(stream: io.BufferedReader, source: str, limit: int) -> Iterator[Located | Reject]:
    import tempfile

    # The index of a Parquet file stands at its end, so a pipe goes through a temporary file.
    with tempfile.TemporaryFile() as spool:
        while chunk := stream.read(_CHUNK):
            spool.write(chunk)
        spool.seek(0)
        yield from _rows(spool, source)


def _rows(file: Any, source: str) -> Iterator[Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # By default the bytes of every column that has been begun are kept.
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=_CHUNK) as table:
            about = table.metadata
            size = sum(about.row_group(place).total_byte_size for place in range(about.num_row_groups))
            rows = _BATCH * about.num_rows // max(size, 1)  # of images, a thousand would be too many to hold
            number = 0
            for batch in table.iter_batches(batch_size=min(max(rows, 1), 1024)):
                for row in batch.to_pylist():
                    number += 1
                    yield Located(row, source, number)
    except pa.ArrowException as error:
        raise DataError(f"{source}: not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _dataset_directory(path: Path) -> Iterator[Located | Reject]:
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(path))
    except Exception as error:
        raise MissingError(
            f"{path}: not a saved dataset: {str(error).splitlines()[0]}", hint="give files, or save_to_disk first"
        ) from error
    if isinstance(data, DatasetDict):
        raise UsageError(f"{path} holds several splits: {', '.join(data)}", hint=f"give one, such as {path / 'train'}")
    yield from (Located(dict(row), str(path), number) for number, row in enumerate(data, 1))


def _dataset_id(name: str) -> Iterator[Located | Reject]:
    from datasets import load_dataset

    identifier, _, split = name.removeprefix("hf:").partition(":")
    try:
        data = load_dataset(identifier, split=split or "train", streaming=True)
        rows = iter(data)
        first = next(rows, None)
    except Exception as error:
        raise MissingError(
            f"{name}: cannot be loaded: {str(error).splitlines()[0]}",
            hint="without a network, give files or a saved dataset",
        ) from error
    number = 0
    while first is not None:
        number += 1
        yield Located(dict(first), name, number)
        first = next(rows, None)


_LAYOUTS: dict[str, Callable[[io.BufferedReader, str, int], Iterator[Located | Reject]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
}


def _shown(raw: bytes) -> str:
    return raw[:80].decode("utf-8", "replace").rstrip()


def near(path: Path) -> str | None:
    """A file beside `path` with a similar name."""
    import difflib

    try:
        names = [p.name for p in path.parent.iterdir()]
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else None


def is_regular(name: str) -> bool:
    """Whether `name` is a file that can be read twice."""
    return name != "-" and Path(name).is_file()
