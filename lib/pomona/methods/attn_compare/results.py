"""The rows of a run on disk: results.jsonl, the same as a spreadsheet, and several runs put together."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pomona.errors import CheckFailed, DataError
from pomona.io.atomic import atomic_file
from pomona.io.records import parse
from pomona.io.writers import dumps
from pomona.methods.attn_compare.config import STUDIES
from pomona.methods.attn_compare.rows import Row
from pomona.report.text import one_line

STATUSES = ("done", "skipped", "failed", "not_converged")
_FIXED = ("study", "kernel", "status", "reason")
_PARTS = ("point", "values", "intervals", "theory", "timing")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write results.jsonl, one row a line, as `read_rows` reads it.

    Raises:
        CheckFailed: a row holds a number that is not finite.
        OutputError: `path` cannot be written.
    """
    with atomic_file(path) as file:
        for row in rows:
            _refuse_nonfinite(row)
            file.write(dumps(dict(row)) + b"\n")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write `rows` flattened, for spreadsheets.

    Columns are study, kernel, status, reason; then those of point, values, intervals, theory and timing, sorted within
    each: ``values.kl``, ``intervals.kl.low``, ``intervals.kl.high``. Lists are JSON; an empty cell is None or absent. A
    text that a spreadsheet program would take for a formula has a quote before it; numbers never have one.

    Raises:
        CheckFailed: a row holds a number that is not finite.
        OutputError: `path` cannot be written.
        DataError: two fields of a row would share a column, as ``{"a.b": 1, "a": {"b": 2}}``.
    """
    flat = []
    for row in rows:
        _refuse_nonfinite(row)
        cells: dict[str, Any] = {}
        for column, value in _flat(row):
            if column in cells:
                raise DataError(f"{_named(row)}: two fields are called {one_line(column, 80)}")
            cells[column] = value
        flat.append(cells)
    names = {name for cells in flat for name in cells} - set(_FIXED)
    header = [*_FIXED, *(name for part in _PARTS for name in sorted(names) if name.startswith(f"{part}."))]
    with atomic_file(path) as file:
        for cells in ({name: name for name in header}, *flat):
            file.write(_line([_cell(cells.get(name)) for name in header]))


def _line(cells: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(cells)  # with "\n" alone a "\r" in a cell would not be quoted
    return (text.getvalue().removesuffix("\r\n") + "\n").encode("utf-8", "replace")


def _flat(row: Row) -> Iterator[tuple[str, Any]]:
    for name in _FIXED:
        yield name, row.get(name)
    for part in _PARTS:
        for name, value in (row.get(part) or {}).items():
            if part == "intervals":
                yield from (
                    (f"{part}.{name}.{end}", side)
                    for end, side in zip(("low", "high"), value or (None, None), strict=True)
                )
            else:
                yield from _leaves(f"{part}.{name}", value)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    else:
        yield name, value


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, bool | list | tuple) else value


def _refuse_nonfinite(row: Row) -> None:
    for name, value in _numbers("", row):
        if not math.isfinite(value):
            raise CheckFailed(f"{_named(row)}: {one_line(name.lstrip('.'), 80)} is {value}")


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(name, inner)


def _named(row: Row) -> str:
    point = row.get("point")
    said = ", ".join(f"{k}={v}" for k, v in point.items()) if isinstance(point, Mapping) else str(point)
    return one_line(f"{row.get('study')} of {row.get('kernel')} at {said}", 200)


def read_rows(data: bytes) -> list[Row]:
    """The rows of a results.jsonl.

    Raises:
        DataError: a line is no such row; the message says which line, and why.
    """
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse(line)
        except ValueError as error:
            raise DataError(f"line {number}: not JSON: {str(error).splitlines()[0]}") from error
        if wrong := fault(row):
            raise DataError(f"line {number}: {wrong}")
        rows.append(row)
    return rows


def fault(row: Any) -> str | None:
    """Why `row` is no row, if it is none."""
    try:
        return _fault(row)
    except RecursionError:
        return "nested too deeply"


def _fault(row: Any) -> str | None:
    if not isinstance(row, dict):
        return "not an object"
    for name in ("study", "kernel", "point", "status"):
        if name not in row:
            return f'"{name}" is missing'
    unknown = set(row) - {*_FIXED, *_PARTS}
    if unknown:
        return f'unknown field "{one_line(min(unknown), 40)}"'
    if row["study"] not in STUDIES:
        return f"study is none of {', '.join(STUDIES)}"
    if row["status"] not in STATUSES:
        return f"status is none of {', '.join(STATUSES)}"
    if not isinstance(row["kernel"], str | None):
        return '"kernel" is not text'
    if not isinstance(row.get("reason"), str | None):
        return '"reason" is not text'
    for part in _PARTS:
        if not isinstance(row.get(part, {}), dict):
            return f'"{part}" is not an object'
    for name, interval in row.get("intervals", {}).items():
        if interval is None:
            continue
        if not (isinstance(interval, list) and len(interval) == 2 and all(map(_is_end, interval))):
            return f'interval "{one_line(name, 40)}" is not [low, high]'
        low, high = interval
        if low is not None and high is not None and low > high:
            return f'interval "{one_line(name, 40)}" ends before it begins'
    try:
        _refuse_nonfinite(row)
    except CheckFailed as error:
        return error.message
    return None


def _is_end(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def merge(runs: Sequence[tuple[str, Sequence[Row]]]) -> list[Row]:
    """The rows of several runs as one, each (study, kernel, point) once, where it first appears.

    Whatever is found twice must be equal, timing apart. A study speaks of one thing, so that runs must agree on what
    all its rows share: separation on its base point, fidelity on model and text. Timings can be compared only where
    contenders took turns, so each place of speed must come from one run.

    Args:
        runs: (name, rows) of each.

    Raises:
        DataError: runs are at odds; the message names both, and what they differ on.
    """
    found: dict[str, tuple[str, Row]] = {}
    frames: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for run, rows in runs:
        for row in rows:
            first, kept = found.setdefault(_key([row["study"], row["kernel"], row["point"]]), (run, row))
            if row["study"] == "speed":
                if kept is row or _key(kept) != _key(row):
                    _one_run_a_place(frames, run, row)
                continue
            if _key(_lasting(kept)) != _key(_lasting(row)):
                raise DataError(
                    f"{one_line(first, 80)} and {one_line(run, 80)} differ on {_named(row)}",
                    hint="merge runs of the same options and seed, or of other kernels and points",
                )
            _one_thing_a_study(frames, run, row)
    return [row for _, row in found.values()]


def _one_run_a_place(frames: dict[str, tuple[str, Mapping[str, Any]]], run: str, row: Row) -> None:
    place = {name: value for name, value in row["point"].items() if name not in ("length", "implementation")}
    first, _ = frames.setdefault(_key(["speed", place]), (run, place))
    if first != run:
        said = ", ".join(f"{name}={value}" for name, value in place.items())
        raise DataError(
            f"{one_line(first, 80)} and {one_line(run, 80)} both timed {one_line(said, 160)}",
            hint="timings that did not take turns are not compared: time all --kernels in one run",
        )


def _one_thing_a_study(frames: dict[str, tuple[str, Mapping[str, Any]]], run: str, row: Row) -> None:
    point = row["point"]
    if row["study"] == "separation" and point.get("part") == "base":
        frame = dict(point)
    elif row["study"] == "fidelity":
        frame = {name: point.get(name) for name in ("source", "full", "tokens", "heatmap") if name in point}
    else:
        return
    first, shared = frames.setdefault(_key([row["study"]]), (run, frame))
    for name in sorted({*shared, *frame}):
        if shared.get(name) != frame.get(name):
            raise DataError(
                f"{one_line(first, 80)} and {one_line(run, 80)} differ in {row['study']}'s {name}: "
                f"{one_line(str(shared.get(name)), 60)} and {one_line(str(frame.get(name)), 60)}",
                hint="one report speaks of one construction and one model",
            )


def _lasting(row: Row) -> dict[str, Any]:
    """`row` without what is not the same in every run; a field that is None or empty is as good as absent."""
    return {name: value for name, value in row.items() if name != "timing" and value not in (None, {})}


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
