"""Tracks: families of tasks, of which MerA merges one at a time (its same-track setting). The user names them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pomona.errors import DataError, MissingError, UsageError
from pomona.methods.mera_merge.adapters import Adapter

_HINT = 'give one object of names and tracks, as {"mnli": "NLI", "sst2": "sentiment"}'


@dataclass(frozen=True)
class Choice:
    """Which adapters are merged.

    Attributes:
        places: of the adapters chosen, ascending.
        said: what to tell the user of it.
        crossed: the chosen adapters are of several tracks.
    """

    places: tuple[int, ...]
    said: str
    crossed: bool = False


def read(path: Path) -> dict[str, str]:
    """The track of each adapter by its label; TOML where the file is called so, else JSON.

    Raises:
        MissingError: the file cannot be read.
        DataError: it is no table of names and tracks, or names one adapter twice.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise MissingError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text", hint=_HINT) from error
    try:
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {str(error).splitlines()[0]}", hint=_HINT) from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds no object", hint=_HINT)
    for name, track in found.items():
        if not isinstance(track, str) or not track.strip():
            raise DataError(f"{path}: the track of {name} is no text", hint=_HINT)
    return {name: track.strip() for name, track in found.items()}


def choose(
    adapters: Sequence[Adapter],
    tracks: Mapping[str, str] | None,
    track: str | None,
    cross_track: Literal["warn", "error"],
) -> Choice:
    """The adapters of `track`, or all of them where none is given.

    Raises:
        DataError: an adapter has no track, or several tracks would be merged and `cross_track` is "error".
        UsageError: no adapter is of `track`.
    """
    everything = tuple(range(len(adapters)))
    if tracks is None:
        count = f"all {len(adapters)} adapters are" if len(adapters) > 1 else "one adapter is"
        return Choice(everything, f"none are given, and {count} merged; they call their tasks {_tasks(adapters)}")
    labels = [adapter.label for adapter in adapters]
    if lacking := [label for label in labels if label not in tracks]:
        raise DataError(f"--tracks gives no track for {', '.join(lacking)}", hint="name every adapter by its label")
    present = list(dict.fromkeys(tracks[label] for label in labels))
    if track is not None:
        places = tuple(place for place in everything if tracks[labels[place]] == track)
        if not places:
            raise UsageError(f"--track {track}: no adapter is of it", hint=f"there are {', '.join(present)}")
        left_out = [label for label in labels if tracks[label] != track]
        rest = f"; left out: {', '.join(left_out)}" if left_out else ""
        return Choice(places, f"track {track}: {', '.join(labels[place] for place in places)}{rest}")
    if len(present) == 1:
        return Choice(everything, f"all are of the track {present[0]}")
    said = f"adapters of {len(present)} tracks are merged: {', '.join(present)}"
    if cross_track == "error":
        raise DataError(said, hint="choose one with --track, or allow it with --cross-track warn")
    return Choice(everything, said, crossed=True)


def task(adapter: Adapter) -> str:
    """What its configuration calls an adapter or its task, else its label."""
    for key in ("name", "task_type"):
        if isinstance(named := adapter.config.get(key), str) and named:
            return named
    return adapter.label


def _tasks(adapters: Sequence[Adapter]) -> str:
    return ", ".join(dict.fromkeys(map(task, adapters)))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is named twice")
    return found
