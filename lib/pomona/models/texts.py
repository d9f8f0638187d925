"""Texts to run a model on: a file of the user's, or passages of our own, a story and a manual."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from importlib import resources
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from pomona.errors import DataError, MissingError, UsageError
from pomona.io import records
from pomona.io.manifest import file_digest

FIELD = "text"
OWN = ("narrative.txt", "documentation.txt")

_RECORDS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
_LINE = 64 * 2**20  # bytes
_HEAD = 2**16  # bytes that tell paragraphs from lines
_BLANK = re.compile(rb"\n[ \t\r\f]*\n")


def own(name: str) -> bytes:
    """The text of ours called `name`, one of `OWN`."""
    return (resources.files("pomona.models") / "texts" / name).read_bytes()


def read_texts(path: Path | None, limit: int) -> list[str]:
    """The first `limit` texts of a file; of our own texts where `path` is None, one passage of each in turn.

    A plain text is its paragraphs or, where no blank line parts its beginning, its lines. Of records (JSONL, JSON, CSV,
    Parquet, plain or compressed) the field ``text`` is read or, if the first has none, its only text.

    Raises:
        MissingError: the file is not there, or cannot be read.
        DataError: it holds no text, is not UTF-8, or a record has no such field.
    """
    if limit < 1:
        raise UsageError(f"{limit} texts are none; ask for 1 or more")
    if path is None:
        passages = zip_longest(*(list(_passages(io.BytesIO(own(name)), name)) for name in OWN))
        return [text for text in chain.from_iterable(passages) if text][:limit]
    _exists(path)
    found = list(islice(_of_records(path) if _holds_records(path) else _of_plain(path), limit))
    if not found:
        raise DataError(f"{path}: it holds no text")
    return found


def digest(path: Path | None) -> dict[str, Any]:
    """Name, size and SHA-256 of what `read_texts` reads, for manifests.

    Raises:
        MissingError: the file is not there, or cannot be read.
    """
    if path is None:
        content = b"".join(map(own, OWN))
        return {"name": "our own texts", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _exists(path)
    try:
        return {"name": path.name, **file_digest(path)}
    except OSError as error:
        raise MissingError(f"{path}: {error.strerror or error}") from error


def _exists(path: Path) -> None:
    if not path.is_file():  # a pipe could not be read a second time, for its digest
        raise MissingError(f"{path}: {'it is no regular file' if path.exists() else 'no such file'}")


def _holds_records(path: Path) -> bool:
    names = [suffix.lower() for suffix in path.suffixes]
    while names and names[-1] in (".gz", ".zst"):
        names.pop()
    return bool(names) and names[-1] in _RECORDS


# --- plain text ------------------------------------------------------------------------------------------------------


def _of_plain(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            yield from _passages(file, str(path))
    except OSError as error:
        raise MissingError(f"{path}: {error.strerror or error}") from error


def _passages(file: BinaryIO, name: str) -> Iterator[str]:
    """Paragraphs, their line breaks kept, or lines; neither blank."""
    head = file.read(_HEAD)
    file.seek(0)
    lines = _lines(file, name)
    if not _BLANK.search(head.strip()):
        yield from (line.strip() for line in lines if line.strip())
        return
    held: list[str] = []
    for line in lines:
        if line.strip():
            held.append(line)
        elif held:
            yield "".join(held).rstrip()
            held = []
    if held:
        yield "".join(held).rstrip()


def _lines(file: BinaryIO, name: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(_LINE), b""), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}:{number}: not UTF-8 text: {error.reason}", hint="compressed or binary files are not read here"
            ) from error
        if "\0" in text:
            raise DataError(f"{name}:{number}: not text: it has a NUL in it")
        yield text.replace("\r\n", "\n")


# --- records ---------------------------------------------------------------------------------------------------------


def _of_records(path: Path) -> Iterator[str]:
    field: str | None = None
    for found in _read(path):
        field = field or _field(found)
        text = found.record.get(field)
        if not isinstance(text, str):
            raise DataError(f"{path}:{found.line}: field {field!r} is missing or no text")
        if text.strip():
            yield text.strip()


def _read(path: Path) -> Iterable[records.Located]:
    for found in records.read([str(path)]):
        if isinstance(found, records.Reject):
            raise DataError(f"{path}:{found.line}: {found.reason}")
        yield found


def _field(first: records.Located) -> str:
    texts = [name for name, value in first.record.items() if isinstance(value, str)]
    if FIELD in texts:
        return FIELD
    if len(texts) != 1:
        said = f"several texts ({', '.join(texts[:5])})" if texts else "no text"
        raise DataError(f"{first.source}:{first.line}: no field {FIELD!r}, and {said}", hint="call the field text")
    return texts[0]
