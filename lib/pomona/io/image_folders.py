"""Images that are files: a folder of them, with classes and splits by its folders' names, or one alone."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pomona.errors import DataError, MissingError
from pomona.io.manifest import file_digest
from pomona.io.picture import Picture, split_of
from pomona.io.pixels import SUFFIXES

_Parts = tuple[str, ...]


class Folder:
    """A folder of images, in the order of their paths.

    The folders right inside are the classes. Where all of those that hold images are called train, test, val or alike,
    they are the splits, and the folders inside them the classes. Links are followed; what is hidden is passed over.

    Raises:
        MissingError: a folder cannot be listed.
        DataError: there is no image, or a folder is reached twice, as by a link to one that holds the link.
    """

    def __init__(self, name: str) -> None:
        self._root = Path(name)
        images, self.skipped = 0, 0
        tops = set()
        for parts in _files(self._root):
            if _is_image(parts):
                images += 1
                tops |= set(parts[:-1][:1])
            else:
                self.skipped += 1
        if not images:
            raise DataError(
                f"{name}: there are no images in this folder",
                hint=f"it has {self.skipped} other files; tables are given by their own names"
                if self.skipped
                else None,
            )
        self.count: int | None = images
        self._has_splits = bool(tops) and None not in map(split_of, tops)

    def __iter__(self) -> Iterator[Picture]:
        for parts in filter(_is_image, _files(self._root)):
            shown = [_text(part) for part in parts]
            split = split_of(shown[0]) if self._has_splits and len(shown) > 1 else None
            inside = shown[1:] if split else shown
            path = self._root.joinpath(*parts)
            label = inside[0] if len(inside) > 1 else None
            yield Picture("/".join(shown), label, split, {}, _text(str(path)), 1, path)

    def sources(self, limit: int | None) -> list[dict[str, Any]]:
        files = ((picture.id, picture.content) for picture in islice(self, limit))
        return [digest_of(_text(self._root.resolve().name), files)]


class Alone:
    """One file that is an image; it has no label."""

    count: int | None = 1
    skipped = 0

    def __init__(self, name: str) -> None:
        self._path = Path(name)

    def __iter__(self) -> Iterator[Picture]:
        yield Picture(_text(self._path.name), None, None, {}, _text(str(self._path)), 1, self._path)

    def sources(self, limit: int | None) -> list[dict[str, Any]]:
        return [digest_of(_text(self._path.name), [("", self._path)])]


def digest_of(name: str, files: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """One entry for many files: how many, their bytes together, and SHA-256 over the path, size and SHA-256 of each.

    What cannot be read counts as such, since it will be rejected.
    """
    total = count = 0
    sha256 = hashlib.sha256()
    for shown, path in files:
        size, digest = 0, "unreadable"
        try:
            if stat.S_ISREG(path.stat().st_mode):  # reading a pipe or a device may never end
                size, digest = file_digest(path).values()
        except (OSError, ValueError):
            pass
        count += 1
        total += size
        sha256.update(f"{shown}\0{size}\0{digest}\n".encode("utf-8", "surrogatepass"))
    return {"name": name, "files": count, "bytes": total, "sha256": sha256.hexdigest()}


def _files(root: Path) -> Iterator[_Parts]:
    """The paths of all files under `root`, as parts and in their order, but for hidden ones' folders."""
    reached: dict[tuple[int, int], str] = {}
    stack: list[tuple[str, _Parts, Iterator[str], set[str]]] = []

    def enter(folder: str, parts: _Parts) -> None:
        try:
            found = os.stat(folder)  # noqa: PTH116  # texts: paths as objects cost more than reading the folders
            with os.scandir(folder) as entries:
                names = {entry.name: _is_folder(entry) for entry in entries}
        except OSError as error:
            raise MissingError(f"{_text(folder)}: {(error.strerror or str(error)).lower()}") from error
        first = reached.setdefault((found.st_dev, found.st_ino), folder)
        if first is not folder:
            raise DataError(
                f"{_text(folder)} is {_text(first)} again, by a link",
                hint="take the link away, or give the folders one by one",
            )
        stack.append((folder, parts, iter(sorted(names)), {name for name, is_folder in names.items() if is_folder}))

    enter(str(root), ())
    while stack:
        folder, parts, names, folders = stack[-1]
        name = next(names, None)
        if name is None:
            stack.pop()
        elif name not in folders:
            yield (*parts, name)
        elif not name.startswith("."):
            enter(f"{folder}{os.sep}{name}", (*parts, name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(parts: _Parts) -> bool:
    return not parts[-1].startswith(".") and Path(parts[-1]).suffix.lower() in SUFFIXES


def _text(name: str) -> str:
    """`name` as Unicode; bytes of a file's name that are none are shown as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
