"""Images that are named by records or held in them: tables of every layout that `records` reads."""

from __future__ import annotations

import base64
import binascii
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from pomona.errors import MissingError
from pomona.io.image_folders import digest_of
from pomona.io.image_options import ImageOptions
from pomona.io.labelled import Label, label_of
from pomona.io.manifest import file_digest
from pomona.io.picture import Picture, plain_fields, split_of
from pomona.io.records import Located, Reject, is_regular, read

STANDARD_INPUT = "standard input"

_DATA = re.compile(r"data:image/[\w.+-]+(;[\w=.-]+)*;base64,")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_SPLIT = "split"


class Table:
    """A file of records, or standard input; paths in it are relative to its folder, or to the working directory.

    What can be read only once, such as a pipe, is kept in a temporary file meanwhile.

    Raises:
        MissingError: it cannot be read.
    """

    count: int | None = None
    skipped = 0

    def __init__(self, name: str, options: ImageOptions) -> None:
        self._options = options
        self._shown = STANDARD_INPUT if name == "-" else name
        self._name = "stdin" if name == "-" else Path(name).name
        self._folder = Path() if name == "-" else Path(name).parent
        self._spool = None if is_regular(name) else _spooled(name)
        self._file = name if self._spool is None else self._spool.name

    def __iter__(self) -> Iterator[Picture | Reject]:
        for what in read([self._file]):
            what = replace(what, source=self._shown)
            if isinstance(what, Located):
                yield picture_of(what, self._options, folder=self._folder, name=self._name)
            else:
                yield what

    def sources(self, limit: int | None) -> list[dict[str, Any]]:
        table = {"name": self._shown if self._spool else self._name, **file_digest(Path(self._file))}
        named = named_files(islice(self, limit), f"images that {table['name']} names")
        return [table, *named]


def named_files(pictures: Iterator[Picture | Reject], name: str) -> list[dict[str, Any]]:
    """One entry for the files that the pictures are in; none where they are in none."""
    files = ((item.id, item.content) for item in pictures if isinstance(item, Picture))
    entry = digest_of(name, (file for file in files if isinstance(file[1], Path)))
    return [entry] if entry["files"] else []


def _spooled(name: str) -> Any:
    """A temporary file, gone when it is no longer used, with all that is read from `name`."""
    spool = tempfile.NamedTemporaryFile(prefix="pomona-")  # noqa: SIM115  # it lives as long as its table
    try:
        with open(0 if name == "-" else name, "rb", closefd=name != "-") as file:
            shutil.copyfileobj(file, spool)
    except OSError as error:
        raise MissingError(f"{name}: {(error.strerror or str(error)).lower()}") from error
    spool.flush()
    return spool


def picture_of(
    what: Located, options: ImageOptions, *, folder: Path, name: str, split: str | None = None
) -> Picture | Reject:
    """What one record says of an image; a `Reject` with the reason where it says nothing usable.

    Args:
        folder: what paths are relative to.
        name: of the source, for the ids of records without one.
        split: of the whole source; a field that names another goes before it.
    """
    record = what.record
    try:
        content, path = _content(_value(record, options, "image_field"), options.image_field, folder)
        label = _label(record, options)
        identifier = _identifier(record, options) or path or f"{name}:{what.line}"
    except ValueError as error:
        return Reject(str(error), what.source, what.line)
    own = split_of(record.get(_SPLIT))
    taken = {options.image_field, options.label_field, options.id_field, *([_SPLIT] if own else [])}
    return Picture(
        identifier, label, own or split_of(split), plain_fields(record, taken), what.source, what.line, content
    )


def _value(record: Mapping[str, Any], options: ImageOptions, option: str) -> Any:
    """The value of a field that must be there: that of images, or one that was asked for by name."""
    field = getattr(options, option)
    asked = option == "image_field" or field != getattr(ImageOptions, option)
    if asked and field not in record:
        raise ValueError(
            f'field "{field}" is missing (use --{option.replace("_", "-")}); there are {", ".join(record):.100}'
        )
    return record.get(field)


def _content(value: Any, field: str, folder: Path) -> tuple[Path | bytes, str | None]:
    """The image, and its path where it has one that tells it from others.

    Raises:
        ValueError: it is no image.
    """
    if isinstance(value, Mapping):  # how `datasets` keeps images
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value, None
    if not isinstance(value, str) or not value:
        raise ValueError(f'field "{field}" holds no image but {_kind(value)}')
    if encoded := _DATA.match(value):
        try:
            return base64.b64decode(value[encoded.end() :], validate=True), None
        except binascii.Error as error:
            raise ValueError(f'field "{field}": damaged base64: {error}') from error
    if _ADDRESS.match(value):
        raise ValueError(f'field "{field}" holds the address {value:.60}; nothing is fetched, give files')
    return folder / value, PurePath(value).as_posix()


def _label(record: Mapping[str, Any], options: ImageOptions) -> Label | None:
    value = _value(record, options, "label_field")
    try:
        return label_of(value)
    except ValueError as error:
        raise ValueError(f'field "{options.label_field}" {error}') from error


def _identifier(record: Mapping[str, Any], options: ImageOptions) -> str | None:
    value = _value(record, options, "id_field")
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # how tables with gaps keep whole numbers
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f'field "{options.id_field}" holds no name but {value!r:.40}')
    return str(value)


def _kind(value: Any) -> str:
    return "null" if value is None else "an empty text" if value == "" else f"a {type(value).__name__}"
