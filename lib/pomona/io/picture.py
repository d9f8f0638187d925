"""One image of an input, not yet decoded, and what its record says of it."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pomona.io.labelled import Label

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

Split = Literal["train", "test", "validation"]
_SPLITS: tuple[tuple[Split, str], ...] = (
    ("train", "train(ing)?"),
    ("test", "test(ing)?"),
    ("validation", "val(id(ation)?)?|dev"),
)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image and what is known of it; light, and it can be sent to another process.

    Attributes:
        id: the record's own, else the path inside the input, else the name and place in the source. Noise and crops are
            keyed by it, so that it is the same wherever the input lies.
        fields: every other field of the record, as JSON has them; bytes are left out.
        source: where it came from, for messages, and `line` the place there from 1.
        content: a file, an encoded image, or pixels (H, W) or (H, W, C).
    """

    id: str
    label: Label | None
    split: Split | None
    fields: Mapping[str, Any]
    source: str
    line: int
    content: Path | bytes | NDArray[uint8]


def split_of(name: object) -> Split | None:
    """The split that `name` means: train, training, test, val, valid, dev, val2017, ...; None where it means none."""
    if isinstance(name, str):
        for split, pattern in _SPLITS:
            if re.fullmatch(rf"({pattern})[-_]?\d*", name.strip().lower()):
                return split
    return None


def plain_fields(record: Mapping[str, Any], without: set[str]) -> dict[str, Any]:
    """The fields of `record` as JSON has them, in order; bytes, and what cannot be said in JSON, are left out."""
    kept = {name: _plain(value) for name, value in record.items() if name not in without}
    return {name: value for name, value in kept.items() if value is not _LEFT_OUT}


_LEFT_OUT = object()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return plain_fields(value, set())
    if isinstance(value, list | tuple):
        return [part for part in map(_plain, value) if part is not _LEFT_OUT]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | Decimal):
        return str(value)
    return _LEFT_OUT
