"""Images with their labels and names, one at a time and in order, from any of the layouts people keep them in.

Nothing is decoded here: that is `pixels`. An input is ``builtin:digits``, a folder of images, a table that `records`
reads, an ``.npz``, a directory saved by `datasets`, or ``hf:NAME[:SPLIT]``.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from pomona.errors import DataError, MissingError, UsageError
from pomona.io.image_arrays import DIGITS, Arrays, Digits
from pomona.io.image_datasets import Hub, Saved, is_saved
from pomona.io.image_folders import Alone, Folder
from pomona.io.image_options import ImageOptions
from pomona.io.image_tables import Table
from pomona.io.picture import Picture
from pomona.io.pixels import SUFFIXES
from pomona.io.records import Reject, near

__all__ = ["Images", "Picture", "Reject"]


class Origin(Protocol):
    """One input.

    Attributes:
        count: how many images it holds, where that is known without reading it.
        skipped: files in it that are no images.
    """

    count: int | None
    skipped: int

    def __iter__(self) -> Iterator[Picture | Reject]: ...

    def sources(self, limit: int | None) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of what decides the first `limit` images."""
        ...


class Images:
    """The images of `inputs`, one input after the other; they can be gone through again and again.

    The first time, all names and labels are read beforehand (no pixels), so that what is wrong with them is known
    before any work is done. Memory is bounded by the longest record, and 8 bytes for each image; ``.npz`` excepted.
    Where one label is text, all are.
    Where some images of an input have labels, those without one are rejected.

    Args:
        inputs: none is ``builtin:digits``; ``-`` is records on standard input.
        limit: take no more than this many from the beginning, rejects included.

    Raises:
        MissingError: an input does not exist or cannot be read.
        DataError: an input is damaged as a whole, holds no image, or two images have one name.
    """

    def __init__(self, inputs: Sequence[str], options: ImageOptions, *, limit: int | None) -> None:
        if inputs.count("-") > 1:
            raise UsageError("standard input is named twice")
        self._limit = limit
        self._origins = [_opened(name, options) for name in inputs or (DIGITS,)]

    @property
    def count(self) -> int | None:
        """How many there are, those that will be rejected included, where that is known without reading."""
        if "_seen" in self.__dict__:
            return sum(seen.items for _, seen in self._seen)
        counts = [origin.count for origin in self._origins]
        known = [count for count in counts if count is not None]
        if len(known) < len(counts):
            return None
        return sum(known) if self._limit is None else min(sum(known), self._limit)

    @property
    def skipped(self) -> int:
        """How many files in folders were passed over because they are no images."""
        return sum(origin.skipped for origin in self._origins)

    @cached_property
    def sources(self) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of what decides the result; a folder is one entry, with the number of its files."""
        return [entry for origin, seen in self._seen for entry in origin.sources(seen.items)]

    def __iter__(self) -> Iterator[Picture | Reject]:
        texts = any(seen.texts for _, seen in self._seen)
        for origin, seen in self._seen:
            for item in islice(origin, seen.items):
                if seen.labelled and isinstance(item, Picture) and item.label is None:
                    yield Reject("it has no label, and others have", item.source, item.line)
                elif texts and isinstance(item, Picture) and isinstance(item.label, int):
                    yield replace(item, label=str(item.label))
                else:
                    yield item

    @cached_property
    def _seen(self) -> list[tuple[Origin, _Seen]]:
        """Every input and what there is in it; a name that two images have is refused."""
        found = []
        keys = array("Q")
        left = self._limit
        for origin in self._origins:
            seen = _Seen()
            for item in islice(origin, left):
                seen.items += 1
                if isinstance(item, Picture):
                    seen.labelled |= item.label is not None
                    seen.texts |= isinstance(item.label, str)
                    keys.append(_key(item.id))
            left = left if left is None else left - seen.items
            found.append((origin, seen))
        if not any(seen.items for _, seen in found):
            raise DataError("there are no images")
        self._refuse_twins(found, keys)
        return found

    def _refuse_twins(self, found: Sequence[tuple[Origin, _Seen]], keys: array[int]) -> None:
        import numpy as np

        ordered = np.sort(np.frombuffer(keys, dtype=np.uint64))
        twins = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        if not twins:
            return
        firsts: dict[str, Picture] = {}
        for item in (item for origin, seen in found for item in islice(origin, seen.items)):
            if isinstance(item, Picture) and _key(item.id) in twins:
                first = firsts.setdefault(item.id, item)
                if first is not item:
                    raise DataError(
                        f'{item.source}:{item.line}: the name "{item.id:.80}" is also that of '
                        f"{first.source}:{first.line}",
                        hint="images are told apart by it: name another --id-field, or the folder above these",
                    )


@dataclass
class _Seen:
    """What there is in an input: images and rejects together, and whether any image has a label, or one of text."""

    items: int = 0
    labelled: bool = False
    texts: bool = False


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _opened(name: str, options: ImageOptions) -> Origin:
    if name.startswith("builtin:"):
        if name != DIGITS:
            raise MissingError(f"{name}: there is only {DIGITS}")
        return Digits()
    if name.startswith("hf:"):
        return Hub(name, options)
    path = Path(name)
    if name != "-" and not path.exists():
        raise MissingError(f"{name}: no such file or folder", hint=near(path))
    if path.is_dir():
        return Saved(name, options) if is_saved(path) else Folder(name)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return Arrays(name, options)
    return Alone(name) if suffix in SUFFIXES else Table(name, options)
