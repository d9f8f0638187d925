"""One run: plan the points of every study, measure those the journal lacks, and say what came of them."""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import orjson

from pomona.errors import CheckFailed, MissingError, UsageError
from pomona.io.atomic import atomic_file, writing
from pomona.io.directory import RunDirectory, read_results
from pomona.io.manifest import changed, file_digest
from pomona.io.writers import brief
from pomona.methods.attn_compare import results
from pomona.methods.attn_compare.config import STUDIES, Config
from pomona.methods.attn_compare.kernels import registered
from pomona.methods.attn_compare.rows import Point, Row, Study, Workshop
from pomona.report.sections import markdown, terminal
from pomona.runtime.jobs import side_by_side
from pomona.runtime.settings import Settings

_DONE, _INCOMPLETE = 0, 3
_HEADING = "Softmax attention and what could stand in its place"
_PREAMBLE = (
    "After *Why Softmax Attention Outperforms Linear Attention* (arXiv 2310.11685, version 2, 2026), which was first "
    "*Superiority of Softmax: Unveiling the Performance Edge Over Linear Attention* (version 1, 2023). Nothing below "
    "is quoted from it: every number was measured, or says where it comes from."
)


def run(config: Config, settings: Settings, work: RunDirectory) -> tuple[dict[str, Any], int]:
    """Do what `config` says; returns the summary for standard output and the exit code: 3 where all was skipped.

    Raises:
        PomonaError: as its class says; results that failed a check are raised by `work` afterwards.
    """
    if work.inputs and not config.merge:
        raise UsageError(f"unexpected argument {work.inputs[0]}", hint="--merge takes finished runs")
    if config.list_kernels:
        for kernel in registered():
            work.emit(kernel.entry())
        return {}, _DONE
    if config.merge:
        return _merge(work)
    if settings.limit is not None:
        raise UsageError("--limit: there are no records here", hint="--kernels, --layers and --lengths limit the work")
    plans = {name: study(name).plan(config, settings) for name in names(config)}
    sources = {name: study(name).sources(config, settings) for name in plans}
    if settings.dry_run:
        if set(plans) - {"separation"}:
            _device(settings)  # whether it is there
        return {"points": {name: len(points) for name, points in plans.items()}, "sources": sources}, _DONE
    if work.path is None:
        raise UsageError("-o RUN is missing, the directory to write", hint="--dry-run prints the plan instead")
    del work.described["config"]["jobs"]  # which decides nothing but the time it takes
    told = [{"study": name, **found} for name, found in sources.items() if found]
    finished = work.finished_before(told)
    if finished is None:
        work.open_journal({})
        points = [point for plan in plans.values() for point in plan]
        rows = _measured(points, sources, config, settings, work)
        finished = _publish(rows, told, _about(config, settings), work)
    else:
        work.progress.warn(f"{work.path} is finished already")
    _hold(finished, work)
    return finished["summary"], finished["code"]


def serve(config: Config, settings: Settings) -> None:
    """This process's share of a launch: none, as points are shared by ``--jobs``."""


def study(name: str) -> Study:
    """The module that implements the study `name`."""
    return cast(Study, importlib.import_module(f"pomona.methods.attn_compare.{name}.study"))


def names(config: Config) -> list[str]:
    """The studies that `config` asks for, in the order in which they run."""
    if not config.study:
        raise UsageError("--study is missing", hint=f"one of {', '.join(STUDIES)} or all")
    return [name for name in STUDIES if name in config.study or "all" in config.study]


# --- measuring -------------------------------------------------------------------------------------------------------


def _measured(
    points: Sequence[Point],
    sources: Mapping[str, Mapping[str, Any]],
    config: Config,
    settings: Settings,
    work: RunDirectory,
) -> list[Row]:
    """The rows of every point, in the order of the plan; those of an earlier attempt come from the journal."""
    keys = {point.name: _key(point, sources[point.study]) for point in points}
    left = [point for point in points if work.journal.get(keys[point.name]) is None]
    with work.scratch() as folder:
        for name in dict.fromkeys(point.study for point in left):
            # Separation is a matter of NumPy; to look for devices would take longer than to do it.
            shop = Workshop(folder / name, "cpu" if name == "separation" else _device(settings))
            shop.scratch.mkdir()
            study(name).prepare(config, settings, shop, work.progress)
            todo = [point for point in left if point.study == name]
            work.progress.start(name, len(todo))
            jobs = 1 if name == "speed" else config.jobs  # nothing else may run beside a timing
            for point, rows in side_by_side(functools.partial(_measure, shop), todo, jobs):
                work.journal.append(keys[point.name], {"rows": rows})
                work.progress.advance()
    return [row for point in points for row in _kept(work, keys[point.name])]


def _kept(work: RunDirectory, key: str) -> Sequence[Row]:
    """The rows that the journal has under `key`, if they are still rows."""
    rows = (work.journal.get(key) or {}).get("rows")
    if not isinstance(rows, list) or any(map(results.fault, rows)):
        raise MissingError(
            f"{work.journal.path}: an entry holds no results", hint="remove the file, or use --overwrite"
        )
    return rows


def _measure(shop: Workshop, point: Point) -> list[dict[str, Any]]:
    return [_storable(row) for row in study(point.study).measure(point, shop)]


def _storable(value: Any) -> Any:
    """`value` with whole numbers that JSON cannot be trusted to keep, those from 2^53, as floats."""
    if isinstance(value, Mapping):
        return {name: _storable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_storable(inner) for inner in value]
    return float(value) if isinstance(value, int) and abs(value) >= 2**53 else value


def _key(point: Point, sources: Mapping[str, Any]) -> str:
    decisive = [point.study, point.settings, sources]
    return hashlib.sha256(orjson.dumps(decisive, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _device(settings: Settings) -> str:
    from pomona.runtime.device import Runtime

    return str(Runtime.open(settings.device, "auto", settings.seed).device)


# --- the end ---------------------------------------------------------------------------------------------------------


def _merge(work: RunDirectory) -> tuple[dict[str, Any], int]:
    """One report over finished runs."""
    if not work.inputs:
        raise UsageError("--merge needs the directories of finished runs")
    if work.path is None:
        raise UsageError("-o RUN is missing, the directory to write")
    read = [(name, results.read_rows(read_results(Path(name), "results.jsonl"))) for name in work.inputs]
    told = [{"source": name, **file_digest(Path(name) / "results.jsonl")} for name in work.inputs]
    rows = results.merge(read)
    if work.settings.dry_run:
        return {"points": dict(Counter(row["study"] for row in rows)), "sources": told}, _DONE
    finished = _publish(rows, told, {"runs": ", ".join(work.inputs)}, work)
    return finished["summary"], finished["code"]


def _about(config: Config, settings: Settings) -> dict[str, str]:
    """What was asked for, where it is not what is always done."""
    told = {name: value for name, value in changed(config).items() if name not in ("study", "jobs")}
    told = {"study": ", ".join(names(config)), "seed": str(settings.seed), **told}
    return told | {"model": settings.model} if settings.model else told


def _publish(
    rows: Sequence[Row], sources: Sequence[Mapping[str, Any]], about: Mapping[str, str], work: RunDirectory
) -> dict[str, Any]:
    present = [name for name in STUDIES if any(row["study"] == name for row in rows)]
    by_study = {name: [row for row in rows if row["study"] == name] for name in present}
    sections = [study(name).section(by_study[name]) for name in present]
    states = Counter(row["status"] for row in rows)
    summary = {
        "studies": {name: brief(study(name).summary(by_study[name])) for name in present},
        "results": dict(sorted(states.items())),
        "run": str(work.path),
    }
    failed = [f"{row['study']} {row['kernel']}: {row.get('reason')}" for row in rows if row["status"] == "failed"]
    finished = {"summary": summary, "code": _DONE if states - Counter(skipped=states["skipped"]) else _INCOMPLETE}
    finished["failed"] = failed
    with work.publish(sources, lambda: finished) as folder:
        results.write_rows(folder / "results.jsonl", rows)
        results.write_csv(folder / "results.csv", rows)
        with atomic_file(folder / "report.md") as file:
            file.write(markdown(_HEADING, _PREAMBLE, sections, about).encode())
        with writing(folder):
            (folder / "figures").mkdir()
        for name in present:
            study(name).draw(by_study[name], folder / "figures")
    work.progress.show("\n".join(terminal(sections)))
    return finished


def _hold(finished: Mapping[str, Any], work: RunDirectory) -> None:
    if failed := finished["failed"]:
        rest = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        work.fail_afterwards(CheckFailed(f"{failed[0]}{rest}", hint="results.jsonl has every reason"))
