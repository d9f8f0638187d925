"""One conversion: recognise the model, convert it, run both side by side, train the new one if asked, publish."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from pomona.errors import CheckFailed, UsageError
from pomona.io.atomic import atomic_file, writing
from pomona.io.directory import RunDirectory
from pomona.io.labelled import Labelled, read_labelled
from pomona.io.manifest import changed, file_digest
from pomona.methods.meo_convert import conversion, data, facts, families, report, training, weighting
from pomona.methods.meo_convert.config import Config, size
from pomona.methods.meo_convert.launch import Job, Launch
from pomona.methods.meo_convert.loading import check, save, tokenizer_of
from pomona.methods.meo_convert.verification import Bench, verify
from pomona.models import texts
from pomona.models.checkpoint import DTYPES, Checkpoint
from pomona.models.loading import directory
from pomona.report.layers import layer_errors
from pomona.report.sections import markdown, terminal
from pomona.runtime import memory
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Quiet
from pomona.runtime.settings import Settings

_DONE = 0
_KIN = 0.9  # mean cosine below which experts are not copies of one another that drifted apart


def run(config: Config, settings: Settings, work: RunDirectory) -> tuple[dict[str, Any], int]:
    """Convert the model that `work` names; returns the summary for standard output and the exit code.

    Raises:
        PomonaError: as its class says. With ``--keep-failed`` a drift above ``--max-drift`` is raised by `work`
            afterwards.
    """
    checkpoint = Checkpoint.open(_place(_named(settings, work)))
    family = families.recognise(checkpoint)
    conversion.check(family, config)
    check(checkpoint)
    tokenizer = tokenizer_of(checkpoint)
    if config.calib is not None:
        texts.read_texts(config.calib, config.calib_samples)
    examples = _examples(config, settings) if config.train is not None else None
    if settings.dry_run:
        batch = settings.batch_size or training.BATCH
        return conversion.foretold(checkpoint, family, config, tokenizer, seed=settings.seed, batch_size=batch), _DONE
    if work.path is None:
        raise UsageError("-o DIR is missing, the directory to write", hint="--dry-run prints the plan instead")
    sources = [*checkpoint.inputs(), texts.digest(config.calib)]
    listed = Path(config.weights) if config.weights is not None and config.weights.endswith(".json") else None
    files = [config.train, config.test, listed]
    sources += [{"name": path.name, **file_digest(path)} for path in files if path is not None]
    runtime = Runtime.open(settings.device, settings.dtype, settings.seed)
    try:
        finished = work.finished_before(sources)
        if finished is None:
            work.open_journal({"settings": work.described, "sources": sources})
            bench = Bench.open(checkpoint, family, tokenizer, config, settings, runtime)
            finished = _publish(config, settings, work, bench, examples, sources)
        else:
            work.progress.warn(f"{work.path} is finished already")
    finally:
        runtime.close()
    if finished["failed"]:
        work.fail_afterwards(CheckFailed(finished["failed"]))
    return finished["summary"] | {"run": str(work.path)} | work.measured, _DONE


def serve(config: Config, settings: Settings) -> None:
    """This process's share of a launch: of training."""
    if settings.dry_run or settings.output is None:
        return
    runtime = Runtime.open(settings.device, settings.dtype, settings.seed)
    Launch(runtime, Quiet())
    runtime.serve()


def _named(settings: Settings, work: RunDirectory) -> str:
    """What the user calls the model to convert."""
    named = [*work.inputs, *([settings.model] if settings.model is not None else [])]
    if len(named) != 1:
        what = f"{len(named)} models are named" if named else "no model is named"
        raise UsageError(f"{what}; give one", hint="a directory, minilm, smollm2, or a hub id")
    return named[0]


def _place(name: str) -> Path:
    """The directory of the model called `name`, or its one file of weights."""
    given = Path(name)
    return given if given.is_file() and given.suffix == ".safetensors" else directory(name)


def _examples(config: Config, settings: Settings) -> tuple[Labelled, Labelled]:
    """The texts to train on, and those to measure with."""
    assert config.train is not None, "the caller has looked"
    fields = [field.strip() for field in config.text_field.split(",")]
    labelled = read_labelled(config.train, text_fields=fields, label_field=config.label_field, limit=settings.limit)
    if config.test is None:
        return data.split(labelled, settings.seed)
    names = labelled.names if config.label_field is not None else None
    return labelled, read_labelled(
        config.test, text_fields=fields, label_field=config.label_field, limit=None, names=names
    )


def _publish(
    config: Config,
    settings: Settings,
    work: RunDirectory,
    bench: Bench,
    examples: tuple[Labelled, Labelled] | None,
    sources: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Convert, verify, train and write; what the manifest keeps of it."""
    checkpoint, family = bench.checkpoint, bench.family
    if not bench.spoken and config.verify != "none":
        work.progress.warn("the model has no tokenizer: it is run on random tokens, and no perplexity is told")
    merging = conversion.action(family, config) == "merge"
    routing = bench.routing() if merging and weighting.needs_routing(family, config) else None
    finished: dict[str, Any] = {}
    with work.publish(sources, lambda: finished) as folder:
        made = conversion.convert(
            checkpoint,
            family,
            config,
            folder,
            routing=routing,
            tokenizer=bench.tokenizer,
            seed=settings.seed,
            progress=work.progress,
        )
        verdict = verify(bench, made, folder, config.verify, work.progress) if config.verify != "none" else None
        routing = bench.routing() if verdict is not None else routing
        found = facts.facts(
            checkpoint,
            family,
            config,
            made,
            Checkpoint.open(folder),
            verdict,
            routing,
            source=_named(settings, work).rstrip("/").rpartition("/")[2],
            spoken=bench.spoken,
        )
        found["failed"] = failed = _judge(config, found, work)
        found["training"] = None
        provenance = made.provenance
        if examples is not None:
            result = _train(config, settings, bench, examples, folder, work)
            written = Checkpoint.open(folder)
            found = facts.trained(found, result, written)
            provenance = facts.retraced(provenance, written)
        work.measured["peak_rss_mb"] = round(memory.peak() / 1e6, 1)
        finished["summary"] = facts.summary(found)
        finished["failed"] = failed
        finished["tensors"] = provenance
        _write(folder, found, config, work)
    work.progress.show("\n".join(terminal(report.sections(found))))
    return finished


def _judge(config: Config, found: Mapping[str, Any], work: RunDirectory) -> str | None:
    """What --max-drift finds fault with, said in a line.

    Raises:
        CheckFailed: the same, unless the output is to be kept even so.
    """
    apart = [value for value in found["cosine"].values() if value is not None]
    if apart and min(apart) < _KIN:
        work.progress.warn(
            f"experts have a cosine of {min(apart):.2f} in some layer: they were not trained from one another, and one "
            "expert cannot stand for them"
        )
    if found["dropped"]:
        work.progress.warn(f"--compat reference lost {len(found['dropped'])} biases, as the released code does")
    drift = found["drift"]
    if drift is None or drift["relative"] <= config.max_drift or found["dropped"]:
        return None
    failed = f"the outputs drift by {drift['relative']:.3g}, above --max-drift {config.max_drift:g}"
    if not config.keep_failed:
        blocks = list(found["layers"].values()) if found["layers_of_experts"] else []
        told = f"; merged experts are {min(blocks):.2f} to {max(blocks):.2f} off in their layers" if blocks else ""
        may = "--align weights may help; " if blocks and config.align == "none" else ""
        raise CheckFailed(failed + told, hint=f"{may}--keep-failed writes it, --max-drift allows more")
    return failed


def _train(
    config: Config,
    settings: Settings,
    bench: Bench,
    examples: tuple[Labelled, Labelled],
    folder: Path,
    work: RunDirectory,
) -> training.TrainingResult:
    """Train what was written into `folder`, in its place."""
    bench.release()
    job = Job(folder, *examples, config, settings.seed, settings.batch_size or training.BATCH)
    launch = Launch(bench.runtime, work.progress)
    model, tokenizer, result = launch.train(job)
    held = next(spec.dtype for spec in Checkpoint.open(folder).specs.values() if DTYPES[spec.dtype].is_floating_point)
    for old in [*folder.glob("model*.safetensors"), *folder.glob("*.index.json")]:
        old.unlink()
    save(model, tokenizer, folder, dtype=DTYPES[held], shard_bytes=size(config.shard_size))
    return result


def _write(folder: Path, found: Mapping[str, Any], config: Config, work: RunDirectory) -> None:
    """Report, figure and model card."""
    with atomic_file(folder / "report.json") as file:
        file.write(orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n")
    about = {"source": found["source"], **changed(config)}
    with atomic_file(folder / "report.md") as file:
        file.write(markdown(report.TITLE, report.PREAMBLE, report.sections(found), about).encode())
    with atomic_file(folder / "README.md") as file:
        settings = dataclasses.replace(work.settings.decisive(), model=None)  # the source is told in any case
        file.write(report.card(found, work.command, [config, settings]).encode())
    if any(found["layers"].values()):
        with writing(folder):
            (folder / "figures").mkdir()
        layer_errors(folder / "figures/layers", report.FIGURE, list(found["layers"]), list(found["layers"].values()))
