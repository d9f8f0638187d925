"""`pomona diffeat-extract`: features of images as a table, and what a probe finds in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from pomona.errors import CheckFailed, UsageError
from pomona.io.arrow import common_schema
from pomona.io.atomic import atomic_file
from pomona.io.directory import RunDirectory
from pomona.io.images import Images, Picture, Reject
from pomona.io.manifest import changed
from pomona.io.rejects import none_readable, refuse_place, reject, unreadable, write_rejects
from pomona.io.shards import Shards
from pomona.io.single import RunFile
from pomona.io.vectors import write_table
from pomona.methods.diffeat_extract import making, measuring, report
from pomona.methods.diffeat_extract.config import Config
from pomona.methods.diffeat_extract.extraction import FeatureReader, keep
from pomona.methods.diffeat_extract.facts import facts, summary
from pomona.methods.diffeat_extract.probing.study import of
from pomona.methods.diffeat_extract.reading import described
from pomona.methods.diffeat_extract.session import Reader, Session
from pomona.methods.diffeat_extract.similarity import similarity
from pomona.methods.diffeat_extract.successor import heads
from pomona.report.sections import markdown, terminal
from pomona.runtime.jobs import one_thread
from pomona.runtime.memory import peak
from pomona.runtime.settings import Settings

_DONE, _INCOMPLETE = 0, 3
_STREAMED = 64  # images at a time, where rows go to standard output

Readers = Mapping[str, Reader]
Study = Callable[[Session, Readers, Images, RunDirectory], dict[str, Any]]


def run(config: Config, settings: Settings, work: RunDirectory) -> tuple[dict[str, Any], int]:
    """Do what the options say with the images that `work` names; returns the summary and the exit code.

    Raises:
        PomonaError: as its class says; an accuracy below ``--fail-under`` is raised by `work` afterwards.
    """
    work.transient = True
    work.described["config"].pop("rejects")  # where they go decides no byte of the output
    refuse_place(config.rejects, settings)
    if config.convert is not None:
        return making.convert(config, settings, work)
    if config.train_model is not None:
        return making.train(config, settings, work)
    session = Session.open(config, settings)
    try:
        if config.list_blocks:
            if work.path is not None:
                raise UsageError("--list-blocks prints to standard output: leave -o out")
            for block in session.table:
                work.emit(asdict(block))
            return {}, _DONE
        images = Images(work.inputs, config, limit=settings.limit)
        if settings.dry_run:
            if session.probed:
                measuring.check(session, images, work)
            return _plan(session, images, work)
        with one_thread():  # small products are slower in several, and their sums would depend on the machine
            return _read(session, images, work)
    finally:
        session.runtime.close()


def serve(config: Config, settings: Settings) -> None:
    """This process's share of the work that the main process of a launch hands out."""
    if config.convert is not None:
        return
    if config.train_model is not None:
        making.serve(settings)
        return
    session = Session.open(config, settings)
    session.register_all()
    session.runtime.serve()


def _read(session: Session, images: Images, work: RunDirectory) -> tuple[dict[str, Any], int]:
    """Read the images, measure what is asked for, and write it."""
    study = _study(session)
    if study is not None and (work.path is None or isinstance(work, RunFile)):
        raise UsageError("a study of several features is written into a directory: give -o DIR")
    if work.path is None and session.settings.resume:
        raise UsageError("--resume needs -o: standard output cannot be resumed")
    readers = session.register_all()
    if work.path is None and session.config.probe == "none":
        return _stream(session, readers, images, work)
    sources = [*images.sources, *session.unet.sources]
    finished = work.finished_before(sources)
    if finished is None:
        if session.probed:
            measuring.check(session, images, work)
        work.open_journal({"settings": work.described, "sources": sources})
        if study is not None:
            finished = _studied(session, readers, images, work, sources, study)
        else:
            finished = _extracted(session, readers, images, work, sources)
    else:
        work.progress.warn(f"{work.path} is finished already")
    if finished["failed"]:
        work.fail_afterwards(CheckFailed(finished["failed"], hint="--fail-under sets the bound"))
    told = finished["summary"] | {name: work.measured[name] for name in ("seconds",) if name in work.measured}
    return told, _INCOMPLETE if told["rejected"] else _DONE


def _study(session: Session) -> Study | None:
    """What is done with features that are not kept."""
    if session.config.sweep:
        return measuring.sweep
    if session.config.cka:
        return similarity
    return heads if session.config.head != "none" else None


def _plan(session: Session, images: Images, work: RunDirectory) -> tuple[dict[str, Any], int]:
    """What would be read, at what cost; records are looked at, and pixels are not."""
    rejects = [reject(item, item.reason) for item in images if isinstance(item, Reject)]
    if rejects and session.config.rejects is None:
        raise unreadable(rejects[0])
    if work.path is not None and _in_parquet(work):
        _check_fields(images)
    reading = session.reading
    columns = reading.columns()
    passes = reading.rows * (2 if session.probed and "random" in session.controls else 1)
    last = max(reading.blocks, key=lambda block: block.number)
    live = session.feedback
    ends = [last.number] if live is None else [max(live.sources), live.head]
    cost = sum(block.flops for end in ends for block in session.table if block.number <= end)
    plan = {
        "images": images.count,
        "rejected": len(rejects),
        "model": session.unet.name,
        **described(reading, session.schedule),
        "columns": {column.name: column.dims for column in columns} if len(columns) <= 16 else len(columns),
        "share_of_the_pass": round(session.share, 4),
        "gflop_per_image": round(passes * cost / 1e9, 3),
        "numbers_per_image": reading.views * sum(column.dims for column in columns),
        "on": session.runtime.why,
    }
    return plan, _INCOMPLETE if rejects else _DONE


def _in_parquet(work: RunDirectory) -> bool:
    return not isinstance(work, RunFile) or (work.path is not None and work.path.name.lower().endswith(".parquet"))


def _check_fields(images: Images) -> None:
    """Find out, before any work, whether Parquet has types for the fields of all rows.

    Raises:
        OutputError: there is one for which it has none.
    """
    fields = (item.fields for item in images if isinstance(item, Picture))
    common_schema(iter(lambda: list(islice(fields, _STREAMED)), []))


def _stream(session: Session, readers: Readers, images: Images, work: RunDirectory) -> tuple[dict[str, Any], int]:
    """Rows with their features to standard output, as they are done."""
    work.progress.start("reading features", images.count)
    rejects: list[Mapping[str, Any]] = []
    rows = 0
    for group in session.groups(images, "features", readers["features"], size=_STREAMED):
        for place, row in enumerate(group.rows):
            work.emit(row | {name: found[place].tolist() for name, found in group.vectors.items()})
        rows += len(group.rows)
        rejects += group.rejects
        work.progress.advance(group.images)
    if not rows:
        raise none_readable(session.config.rejects, rejects)
    write_rejects(session.config.rejects, rejects)
    work.progress.show(f"pomona {work.command}: {rows} rows out, {len(rejects)} rejected")
    return {}, _INCOMPLETE if rejects else _DONE


def _extracted(
    session: Session,
    readers: Readers,
    images: Images,
    work: RunDirectory,
    sources: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Features kept shard by shard, probed, and written as one table."""
    if work.path is not None and _in_parquet(work):
        _check_fields(images)
    wanted = ["features"]
    if session.config.probe != "none":
        wanted += [name for name in ("random", "pixels") if name in readers]
    kept = {name: _kept(session, name, readers[name], images, work) for name in wanted}
    found = facts(session, images=sum(map(len, kept["features"].rows())) // session.reading.views)
    found["rejects"] = list(kept["features"].rejects())
    if not found["images"]:
        raise none_readable(session.config.rejects, found["rejects"])
    if session.config.probe != "none":
        found["probe"] = measuring.probe(session, kept, work)
    finished = _finish(session, found, work)
    if work.path is None:
        return finished
    with work.publish(sources, lambda: finished) as folder:
        single = isinstance(work, RunFile)
        about = described(session.reading, session.schedule) | {
            "model": session.unet.name,
            "dtype": str(session.runtime.dtype).removeprefix("torch."),
            "seed": session.settings.seed,
        }
        write_table(
            folder / (work.path.name if single else "features.parquet"),
            kept["features"],
            kept["features"].columns,
            dtype=session.config.save_dtype,
            about=about,
        )
        if not single:
            _write(session, folder, found, work)
    return finished


def _kept(session: Session, name: str, reader: Reader, images: Images, work: RunDirectory) -> Shards:
    """The shards of one task; those that an interrupted run has left are not read again."""
    columns = reader.columns if isinstance(reader, FeatureReader) else [measuring.pixel_column(session)]
    dtype = session.config.save_dtype if name == "features" else "float32"
    shards = Shards(work.kept, work.journal, columns, dtype, name=name)
    work.progress.start(_LABELS[name], images.count)

    def there(index: int) -> bool:
        if shards.has(index):
            work.progress.advance(session.config.shard_size)
            return True
        return False

    keep(session.groups(images, name, reader, skip=there), shards, work.progress)
    return shards


_LABELS = {"features": "reading features", "random": "reading random weights", "pixels": "reading pixels"}


def _studied(
    session: Session,
    readers: Readers,
    images: Images,
    work: RunDirectory,
    sources: Sequence[Mapping[str, Any]],
    study: Study,
) -> dict[str, Any]:
    """A study whose features are not kept: its numbers, its report, its figures."""
    result = study(session, readers, images, work)
    found = facts(session, images=result.pop("images"))
    found["rejects"] = result.pop("rejects")
    name = "sweep" if session.config.sweep else "cka" if session.config.cka else "head"
    found[name] = result
    finished = _finish(session, found, work)
    with work.publish(sources, lambda: finished) as folder:
        _write(session, folder, found, work)
    return finished


def _finish(session: Session, found: dict[str, Any], work: RunDirectory) -> dict[str, Any]:
    """What the manifest keeps; the images that could not be read are set aside now."""
    write_rejects(session.config.rejects, found["rejects"])
    work.measured["seconds"] = round(work.elapsed, 1)
    work.measured["peak_rss_mb"] = round(peak() / 1e6)
    work.progress.show("\n".join(terminal(report.sections(found))))
    return {"summary": summary(found, work), "failed": _failed(session.config, found)}


def _failed(config: Config, found: Mapping[str, Any]) -> str | None:
    """What --fail-under finds fault with."""
    probed = found["probe"] or found["sweep"] or found["head"]
    if config.fail_under is None or probed is None:
        return None
    best = of(probed["rows"], "features", probed["chosen"])
    assert best is not None, "there are features"
    if best["mean"] >= config.fail_under:
        return None
    return f"the accuracy is {best['mean']:.3f}, below --fail-under {config.fail_under:g}"


def _write(session: Session, folder: Path, found: dict[str, Any], work: RunDirectory) -> None:
    """Report and figures."""
    with atomic_file(folder / "report.json") as file:
        file.write(orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n")
    about = {
        "images": ", ".join(work.inputs) or "builtin:digits",
        "model": session.unet.name,
        **changed(session.config),
    }
    with atomic_file(folder / "report.md") as file:
        file.write(markdown(report.TITLE, report.PREAMBLE, report.sections(found), about).encode())
    report.figures(found, folder / "figures")
