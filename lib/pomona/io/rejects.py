"""Images that cannot be read: set aside with reasons where the user asks for it, else the first stops the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pomona.errors import DataError, OutputError, UsageError
from pomona.io.atomic import atomic_file, writing
from pomona.io.picture import Picture
from pomona.io.records import Reject
from pomona.io.writers import dumps
from pomona.runtime.settings import Settings


def reject(item: Picture | Reject, reason: str) -> dict[str, Any]:
    """What is kept of an image that cannot be read."""
    named = {"id": item.id} if isinstance(item, Picture) else {}
    return {"reason": reason, "source": item.source, "line": item.line, **named}


def unreadable(entry: Mapping[str, Any]) -> DataError:
    """What the run fails with where none are set aside."""
    place = entry.get("id") or f"{entry['source']}:{entry['line']}"
    return DataError(f"{place}: {entry['reason']}", hint="--rejects FILE sets unreadable images aside and goes on")


def write_rejects(path: Path | None, rejects: Iterable[Mapping[str, Any]]) -> None:
    """Write those that could not be read, with reasons, as JSONL."""
    if path is not None:
        with atomic_file(path) as file, writing(path):
            for entry in rejects:
                file.write(dumps(entry) + b"\n")


def refuse_place(path: Path | None, settings: Settings) -> None:
    """Raise, before any work, what speaks against setting unreadable images aside at `path`.

    Raises:
        OutputError: it exists, and is not to be replaced; or it cannot.
        UsageError: it is the output.
    """
    if path is None or settings.dry_run:
        return
    if settings.output is not None and path.absolute() == settings.output.absolute():
        raise UsageError(f"--rejects {path}: this is the output", hint="give a file of its own")
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a directory")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: the folder does not exist")
    if path.exists() and not (settings.overwrite or settings.resume):
        raise OutputError(f"{path} exists", hint="--overwrite replaces it, --resume continues an interrupted run")


def none_readable(path: Path | None, rejects: Sequence[Mapping[str, Any]]) -> DataError:
    """What the run fails with where all are set aside, which is done here."""
    write_rejects(path, rejects)
    return DataError(f"no image could be read; of the first: {rejects[0]['reason']}")
