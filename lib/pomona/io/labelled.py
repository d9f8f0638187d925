"""Texts with labels, whole in memory, from every layout that `records` reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pomona.errors import DataError
from pomona.io.records import Located, Reject, read

Label = str | int


@dataclass(frozen=True)
class Labelled:
    """Texts and what each is labelled.

    Attributes:
        texts: the segments of each text, one for each field that was asked for.
        labels: the place of each text's label in `names`; empty where no labels were asked for.
        names: the labels in order: by value where all are whole numbers, else by their characters.
    """

    texts: list[tuple[str, ...]]
    labels: list[int]
    names: list[str]


def read_labelled(
    path: Path,
    *,
    text_fields: Sequence[str],
    label_field: str | None,
    limit: int | None = None,
    names: Sequence[str] | None = None,
) -> Labelled:
    """The first `limit` records of `path`, all where it is None.

    Args:
        label_field: None for texts alone. A label is a text, a whole number or a truth value; 1 and "1" are one label.
        names: the labels there may be, in their order, where another file has decided them.

    Raises:
        DataError: no records, or one, named by its line, that is none, lacks a field, is blank or has another label.
        MissingError: the file is not there or cannot be read.
    """
    texts, found = [], []
    for what in islice(read([str(path)]), limit):
        if isinstance(what, Reject):
            raise DataError(f"{what.source}:{what.line}: {what.reason}")
        texts.append(_segments(what, text_fields))
        if label_field is not None:
            found.append(_label(what, label_field, names))
    if not texts:
        raise DataError(f"{path}: there are no records")
    known = list(names) if names is not None else ordered(set(found))
    places = {name: place for place, name in enumerate(known)}
    return Labelled(texts, [places[name] for name in found], known)


def _segments(what: Located, fields: Sequence[str]) -> tuple[str, ...]:
    segments = tuple(_value(what, field, "--text-field") for field in fields)
    for field, segment in zip(fields, segments, strict=True):
        if not isinstance(segment, str):
            kind = type(segment).__name__
            raise DataError(f'{what.source}:{what.line}: field "{field}" holds no text but {_an(kind)}')
    if not any(map(str.strip, segments)):
        raise DataError(f"{what.source}:{what.line}: the text is blank")
    return segments


def _label(what: Located, field: str, names: Sequence[str] | None) -> str:
    try:
        label = label_of(_value(what, field, "--label-field"))
        if label is None:
            raise ValueError(f"holds no label but {what.record[field]!r:.40}")
    except ValueError as error:
        raise DataError(
            f'{what.source}:{what.line}: field "{field}" {error}',
            hint="a label is a text, a whole number, true or false",
        ) from error
    name = str(label)
    if names is not None and name not in names:
        raise DataError(
            f'{what.source}:{what.line}: label "{name:.40}" is not among those to learn',
            hint=f"they are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}",
        )
    return name


def label_of(value: object) -> Label | None:
    """A label as records hold it: text, a whole number or a truth value; None where there is none.

    Raises:
        ValueError: it is something else.
    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return int(value)  # how tables with gaps keep whole numbers
    if isinstance(value, str | int):
        return value
    raise ValueError(f"holds no label but {value!r:.40}")


def _value(what: Located, field: str, option: str) -> Any:
    if field not in what.record:
        there = ", ".join(what.record)
        raise DataError(
            f'{what.source}:{what.line}: field "{field}" is missing (use {option})',
            hint=f"the fields there are {there:.120}" if there else None,
        )
    return what.record[field]


def ordered(names: set[str]) -> list[str]:
    """Labels in order: by value where all are whole numbers, else by their characters."""
    try:
        return sorted(names, key=lambda name: (int(name), name))  # 1 and 01 are two labels
    except ValueError:
        return sorted(names)


def _an(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" if kind != "NoneType" else "null"
