"""Finished work that survives any end of the process.

A journal is a JSONL file beside the output. Its first line is the fingerprint of everything that decides the results;
every other line is one finished piece of work under a key made from its content. A line is handed to the kernel
before `append` returns, so `kill -9` loses nothing, and is on the disk within a second, so power loss loses
little. A torn last line is dropped on opening. Only keys and file offsets are held in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from pomona.errors import MissingError, OutputError, UsageError
from pomona.io.atomic import atomic_file, writing
from pomona.io.records import parse

_FSYNC_EVERY_S = 1.0


class Journal:
    """Append-only results on disk; see the module."""

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        """Open `path`, continuing it when `resume` is set and starting afresh otherwise.

        Raises:
            UsageError: `path` was made with another fingerprint; the message names what differs.
            MissingError: `path` is not a journal.
            OutputError: `path` cannot be written.
        """
        self.path = path
        self._offsets: dict[str, tuple[int, int]] = {}
        self._synced = time.monotonic()
        with writing(path):
            self._file = path.open("r+b" if resume and path.exists() else "w+b", buffering=0)
        self._end = self._read(fingerprint)
        if self._end == 0:
            self._write(_line({"fingerprint": dict(fingerprint)}))
        with path.open("rb") as lines:
            self._header = len(lines.readline())

    def _read(self, fingerprint: Mapping[str, Any]) -> int:
        """Index what is there and cut a torn last line; returns where the next line goes."""
        end = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = orjson.loads(line)
                    if number == 0:
                        _same(entry["fingerprint"], fingerprint, self.path)
                    else:
                        if not (isinstance(entry["key"], str) and isinstance(entry["value"], dict)):
                            raise TypeError
                        self._offsets[entry["key"]] = (end, len(line))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise MissingError(
                        f"{self.path}:{number + 1}: not a line of a journal", hint="remove the file, or use --overwrite"
                    ) from error
                end += len(line)
        self._file.truncate(end)
        return end

    def _write(self, lines: bytes) -> None:
        with writing(self.path):
            written = 0
            while written < len(lines):
                written += os.pwrite(self._file.fileno(), memoryview(lines)[written:], self._end + written)
            if time.monotonic() - self._synced > _FSYNC_EVERY_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        self._end += len(lines)

    def get(self, key: str) -> dict[str, Any] | None:
        """The value stored under `key`, or None."""
        place = self._offsets.get(key)
        if place is None:
            return None
        value: dict[str, Any] = parse(os.pread(self._file.fileno(), place[1], place[0]))["value"]
        return value

    def keys(self) -> list[str]:
        """The keys there are, in the order in which they were first stored."""
        return list(self._offsets)

    def append(self, key: str, value: Mapping[str, Any]) -> None:
        """Store `value` under `key`; on return it survives the end of the process."""
        self.append_all({key: value})

    def append_all(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Store several values in one write; on return all survive the end of the process."""
        lines = [_line({"key": key, "value": value}) for key, value in entries.items()]
        start = self._end
        self._write(b"".join(lines))
        for key, line in zip(entries, lines, strict=True):
            self._offsets[key] = start, len(line)
            start += len(line)

    def write_sorted(self, path: Path) -> None:
        """Write the same journal to `path` with its entries in the order of their keys."""
        with atomic_file(path) as file:
            file.write(os.pread(self._file.fileno(), self._header, 0))
            for _, (start, length) in sorted(self._offsets.items()):
                file.write(os.pread(self._file.fileno(), length, start))

    def __len__(self) -> int:
        return len(self._offsets)

    def __bool__(self) -> bool:
        return True  # an empty journal is a journal

    def close(self, *, remove: bool = False) -> None:
        """Flush to the disk and close; with `remove`, delete the file."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())
            self._file.close()
        if remove:
            self.path.unlink(missing_ok=True)


class NoJournal:
    """Stands in where nothing can be resumed."""

    path: Path | None = None

    def get(self, key: str) -> dict[str, Any] | None:
        return None

    def append(self, key: str, value: Mapping[str, Any]) -> None:
        return None

    def append_all(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        return None

    def __len__(self) -> int:
        return 0

    def close(self, *, remove: bool = False) -> None:
        return None


def holds_work(path: Path) -> bool:
    """Whether there is a journal at `path` with anything in it besides its first line."""
    try:
        with path.open("rb") as lines:
            lines.readline()
            return bool(lines.readline())
    except FileNotFoundError:
        return False


def refuse_existing(path: Path) -> None:
    """Raise `OutputError` when an earlier run left work in a journal and the user has not said what to do with it."""
    if holds_work(path):
        raise OutputError(
            f"an earlier run left its work in {path}", hint="--resume continues it, --overwrite throws it away"
        )


def _line(entry: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # integers beyond 64 bits, or truly not JSON
        return json.dumps(entry, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _same(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    differing = _difference(found, wanted)
    if differing is not None:
        key, was, now = differing
        raise UsageError(
            f"{path} was made with {key} = {was!r:.200}, now it is {now!r:.200}",
            hint="use the earlier settings to resume, or --overwrite to start again",
        )


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first entry that is not the same in both, however deep, with its values; an absent one is None."""
    for key in sorted({*found, *wanted}):
        was, now = found.get(key), wanted.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            if inner := _difference(was, now):
                return f"{key}.{inner[0]}", *inner[1:]
        elif was != now:
            return key, was, now
    return None
