"""Vectors of a long run, kept in shards as they are done, so that a killed run loses at most the shard in hand.

A shard is a safetensors file, one tensor a column, and a line of the run's journal with its rows, what was rejected
among them, and the digests of its columns. The file is whole before the line is written; a file that is not what its
line says counts as not done.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pomona.errors import CheckFailed, MissingError, OutputError
from pomona.io.atomic import atomic_file, writing
from pomona.io.journal import Journal, NoJournal
from pomona.io.tensors import header

if TYPE_CHECKING:
    from numpy.typing import NDArray

Dtype = Literal["float32", "float16"]
Row = dict[str, Any]

_SHARD = re.compile(
    r"\.?(([a-z]+|([a-z]+-)?[0-9]{8}|[a-z+]+--?[0-9]+(\.state)?)\.safetensors|images\.npy|data\.json)(\.partial)?"
)

TENSOR_DTYPES: dict[str, str] = {"float32": "F32", "float16": "F16"}
"""Number formats of vectors by their names in NumPy, and the names that safetensors has for them."""


@dataclass(frozen=True)
class Column:
    """A vector that every row has.

    Attributes:
        name: what the column is called in every output.
        dims: numbers in the vector.
        about: what it was made with, as plain JSON.
    """

    name: str
    dims: int
    about: Mapping[str, Any]


class Shards:
    """Rows with their vectors, by index of the shard; see the module.

    Args:
        folder: where the files go; it is made with the first.
        journal: where the lines go, under the index; a transient run has one also where it writes no output.
        dtype: number format of the vectors.
        name: tells several sets of shards in one folder and journal apart, in lower-case letters.
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal | NoJournal,
        columns: Sequence[Column],
        dtype: Dtype,
        *,
        name: str = "",
    ) -> None:
        assert isinstance(journal, Journal), "open_journal() comes first, and a dry run writes no shards"
        self.folder = folder
        self._prefix = f"{name}-" if name else ""
        self.columns = tuple(columns)
        self.dtype = dtype
        self._journal = journal

    def has(self, index: int) -> bool:
        """Whether the shard is there, whole and undamaged."""
        entry = self._journal.get(self._key(index))
        if entry is None:
            return False
        try:
            for _ in self._read(index, entry, self.columns):
                pass
        except MissingError:
            return False
        return True

    def write(
        self,
        index: int,
        rows: Sequence[Mapping[str, Any]],
        vectors: Mapping[str, NDArray[Any]],
        rejects: Sequence[Mapping[str, Any]],
    ) -> None:
        """Keep one shard; on return it survives the end of the process. Writing it again replaces it.

        Args:
            rows: what each row holds besides vectors, as plain JSON; where there are none, there need be no vectors.
            vectors: (rows, dims) of every column.
            rejects: what was set aside on the way.

        Raises:
            CheckFailed: a number is not finite, or not in `dtype`; the message names row and column.
            OutputError: the disk is full, or refuses otherwise.
        """
        import numpy as np

        none = {column.name: np.empty((0, column.dims)) for column in self.columns}
        given = vectors if rows else none
        stored = {column.name: as_stored(column, rows, given[column.name], self.dtype) for column in self.columns}
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        path = self._path(index)
        tensors = [(name, TENSOR_DTYPES[self.dtype], values.shape) for name, values in stored.items()]
        with atomic_file(path) as file, writing(path):
            file.write(header(tensors, {}))
            for values in stored.values():
                file.write(values.data)
        digests = {name: _digest(values) for name, values in stored.items()}
        entry = {"rows": [dict(row) for row in rows], "rejects": [dict(one) for one in rejects], "sha256": digests}
        self._journal.append(self._key(index), entry)

    def rows(self) -> Iterator[list[Row]]:
        """The rows of each shard, in the order of the indices."""
        for _, entry in self._entries():
            yield entry["rows"]

    def rejects(self) -> Iterator[Row]:
        """What was set aside, in the order of the indices."""
        for _, entry in self._entries():
            yield from entry["rejects"]

    def __iter__(self) -> Iterator[tuple[list[Row], dict[str, NDArray[Any]]]]:
        """The rows and the vectors of each shard, in the order of the indices; one shard is in memory at a time.

        Raises:
            MissingError: a file is gone or damaged since it was written.
        """
        for index, entry in self._entries():
            yield entry["rows"], dict(self._read(index, entry, self.columns))

    def column(self, name: str) -> NDArray[Any]:
        """All vectors of one column, of shape (rows, dims); the others are not read.

        Raises:
            MissingError: as for iterating.
        """
        import numpy as np

        wanted = [column for column in self.columns if column.name == name]
        values = np.empty((sum(map(len, self.rows())), wanted[0].dims), self.dtype)
        end = 0
        for index, entry in self._entries():
            for _, part in self._read(index, entry, wanted):
                values[end : end + len(part)] = part
                end += len(part)
        return values

    def _entries(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        keys = self._journal.keys()
        for key in sorted(key for key in keys if key.startswith(self._prefix)):
            entry = self._journal.get(key)
            assert entry is not None, "the key is one of the journal's"
            yield int(key.removeprefix(self._prefix)), entry

    def _key(self, index: int) -> str:
        return f"{self._prefix}{index:08}"

    def _path(self, index: int) -> Path:
        return self.folder / f"{self._key(index)}.safetensors"

    def _read(
        self, index: int, entry: Mapping[str, Any], wanted: Sequence[Column]
    ) -> Iterator[tuple[str, NDArray[Any]]]:
        """Name and vectors of some columns of a shard; the header is not read, as the columns decide it."""
        import numpy as np

        path, rows = self._path(index), len(entry["rows"])
        tensors = [(column.name, TENSOR_DTYPES[self.dtype], (rows, column.dims)) for column in self.columns]
        begin = len(header(tensors, {}))
        try:
            with path.open("rb") as file:
                for column in self.columns:
                    if column in wanted:
                        values = np.empty((rows, column.dims), self.dtype)
                        file.seek(begin)
                        read = file.readinto(values.reshape(-1).data)
                        if read != values.nbytes or _digest(values) != entry["sha256"].get(column.name):
                            raise MissingError(f"{path} is damaged", hint="--resume makes it again")
                        yield column.name, values
                    begin += rows * column.dims * np.dtype(self.dtype).itemsize
        except OSError as error:
            raise MissingError(f"{path} is gone or unreadable", hint="--resume makes it again") from error


def as_stored(column: Column, rows: Sequence[Mapping[str, Any]], values: NDArray[Any], dtype: Dtype) -> NDArray[Any]:
    """`values` of shape (rows, dims) in the number format that is written, contiguous.

    Raises:
        CheckFailed: a number is not finite, or beyond the range of `dtype`; the message names row and column.
    """
    import numpy as np

    if values.shape != (len(rows), column.dims):
        raise ValueError(f"{column.name}: {values.shape} instead of {(len(rows), column.dims)}")
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype)
    if not np.isfinite(stored).all():
        row, place = np.argwhere(~np.isfinite(stored))[0]
        named = rows[row].get("id", f"number {row}")
        number = values[row, place]
        if np.isfinite(number):
            raise CheckFailed(
                f"row {named}: column {column.name}: {number:.6g} is beyond {dtype}", hint="--save-dtype float32"
            )
        raise CheckFailed(f"row {named}: column {column.name} holds numbers that are not finite")
    return stored


def discard(folder: Path) -> None:
    """Delete the shards in `folder`, and the folder.

    Raises:
        OutputError: something else is in it; then all stays.
    """
    if not folder.is_dir():
        return
    files = list(folder.iterdir())
    if strange := [path for path in files if not _SHARD.fullmatch(path.name)]:
        raise OutputError(f"{strange[0]} is no file of a run, and its folder is to be replaced", hint="move it away")
    with writing(folder):
        for path in files:
            path.unlink()
        folder.rmdir()


def _digest(values: NDArray[Any]) -> str:
    return hashlib.sha256(values.data).hexdigest()
