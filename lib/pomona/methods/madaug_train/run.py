"""`pomona madaug-train`: a classifier, the policy that augmented its images, and what both are worth beside others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from pomona.errors import CheckFailed, UsageError
from pomona.io.atomic import atomic_file, writing
from pomona.io.directory import RunDirectory
from pomona.io.manifest import changed
from pomona.io.rejects import refuse_place, write_rejects
from pomona.io.writers import dumps
from pomona.methods.madaug_train import evaluation, figures, report, study, training
from pomona.methods.madaug_train.config import Config
from pomona.methods.madaug_train.data import Inputs, Prepared
from pomona.methods.madaug_train.facts import Facts, choices, facts, kept_epoch, summary
from pomona.methods.madaug_train.operations.table import chosen
from pomona.methods.madaug_train.recipe import Recipe, recipe
from pomona.methods.madaug_train.saved import Frozen, Shape, read_policy, write_model, write_policy
from pomona.methods.madaug_train.schedule import Schedule
from pomona.methods.madaug_train.splits import drawn
from pomona.methods.madaug_train.table import write_history
from pomona.methods.madaug_train.training import Trained
from pomona.report.sections import markdown, terminal
from pomona.runtime.device import Runtime
from pomona.runtime.memory import peak
from pomona.runtime.settings import Settings

_DONE, _INCOMPLETE = 0, 3
_WITHOUT_EFFECT = ("rejects", "jobs")  # options that decide no byte of the output
_DIGITS = ((), ("builtin:digits",))


def run(config: Config, settings: Settings, work: RunDirectory) -> tuple[dict[str, Any], int]:
    """Train, compare and write what the options say; returns the summary and the exit code.

    Raises:
        PomonaError: as its class says; an accuracy below ``--fail-under`` is raised by `work` afterwards.
    """
    work.transient = True
    for name in _WITHOUT_EFFECT:
        work.described["config"].pop(name)
    if settings.model is not None:
        raise UsageError("--model has no use here", hint="--net names the network, --evaluate a trained one")
    refuse_place(config.rejects, settings)
    if config.evaluate is not None:
        return evaluation.evaluate(config, settings, work)
    settled = recipe(config, _preset(config, work.inputs), settings.batch_size)
    frozen = _check(config, settings, settled)
    inputs = Inputs(config, settings, work.inputs)
    if settings.dry_run:
        return _plan(config, settled, inputs, work), _DONE
    if work.path is None:
        raise UsageError("-o DIR is missing, the directory to write", hint="--dry-run prints the plan instead")
    runtime = _runtime(settings)
    try:
        sources = [*inputs.sources, *(frozen.sources if frozen is not None else [])]
        finished = work.finished_before(sources)
        if finished is None:
            finished = _train(config, settings, settled, inputs, work, runtime, sources, frozen)
        else:
            work.progress.warn(f"{work.path} is finished already")
    finally:
        runtime.close()
    if finished["failed"]:
        work.fail_afterwards(CheckFailed(finished["failed"], hint="--fail-under sets the bound"))
    told = finished["summary"] | {name: work.measured[name] for name in ("seconds",) if name in work.measured}
    return told, _INCOMPLETE if told["rejected"] else _DONE


def serve(config: Config, settings: Settings) -> None:
    """This process's share of the work that the main process of a launch hands out."""
    if settings.dry_run:
        return
    if config.evaluate is not None:
        evaluation.serve(config, settings)
        return
    runtime = _runtime(settings)
    training.share(runtime)
    runtime.serve()


def _runtime(settings: Settings) -> Runtime:
    """Where to train; on a processor in float32 unless told otherwise, so that machines learn the same."""
    runtime = Runtime.open(settings.device, settings.dtype, settings.seed)
    if settings.dtype == "auto" and runtime.device.type == "cpu":
        return Runtime.open(settings.device, "float32", settings.seed)
    return runtime


def _preset(config: Config, inputs: Sequence[str]) -> str:
    return config.preset or ("digits" if tuple(inputs) in _DIGITS else "photos")


def _check(config: Config, settings: Settings, settled: Recipe) -> Frozen | None:
    """Refuse what cannot come to anything, before any image is read; the policy of ``--policy``.

    Raises:
        UsageError: there are fewer operations than are applied to an image; float16.
        MissingError: there is no such policy.
    """
    if settings.dtype == "float16":
        raise UsageError("training in float16 would lose small gradients", hint="use --dtype bfloat16 or float32")
    operations = chosen(settled.ops)
    if settled.k > len(operations):
        raise UsageError(f"--k {settled.k}: there are {len(operations)} operations to draw without replacement")
    if config.policy is not None:
        return read_policy(config.policy)
    return None


def _plan(config: Config, settled: Recipe, inputs: Inputs, work: RunDirectory) -> dict[str, Any]:
    """What would be trained on what; pixels are not looked at."""
    told = inputs.foretold()
    _refuse_unlearned(config, settled, told["train"])
    return {
        **told,
        "preset": _preset(config, work.inputs),
        "recipe": asdict(settled),
        "trainings": [f"{name}, {config.seeds} seed{'s' * (config.seeds > 1)}" for name in study.names(config)],
    }


def _refuse_unlearned(config: Config, settled: Recipe, images: int) -> None:
    """Refuse a training on so many images of which no step would move the policy.

    Raises:
        CheckFailed: it is one.
    """
    if config.augment != "madaug" or config.policy is not None:
        return
    schedule = Schedule(settled, images, 0)
    if not schedule.updates:
        raise CheckFailed(
            f"0 policy updates would be made: none of the {schedule.steps:,} steps is a multiple of --policy-every "
            f"{settled.policy_every} from epoch {settled.policy_start} on",
            hint="a smaller --policy-every or --policy-start learns one, --augment random trains without learning",
        )


def _train(
    config: Config,
    settings: Settings,
    settled: Recipe,
    inputs: Inputs,
    work: RunDirectory,
    runtime: Runtime,
    sources: Sequence[Mapping[str, Any]],
    frozen: Frozen | None,
) -> dict[str, Any]:
    """Prepare the images, train everything, and write it."""
    if config.jobs > 1 and runtime.world > 1:
        raise UsageError("--jobs trains in processes of its own: leave it out under a launch")
    _refuse_unlearned(config, settled, inputs.foretold()["train"])
    work.open_journal({"settings": work.described, "sources": sources})
    with writing(work.kept):
        work.kept.mkdir(exist_ok=True)
    prepared, rejects = inputs.prepare(work.kept, work.progress)
    for seed in range(settings.seed, settings.seed + config.seeds):
        divided = drawn(prepared, prepared.options, seed=seed)  # what is wrong is told before any training
        _refuse_unlearned(config, settled, len(divided.train))
    work.journal.append("begun", {})  # what --resume and --overwrite are asked about from now on
    dtype = str(runtime.dtype).removeprefix("torch.")
    jobs = study.plan(config, settings, settled, work.kept, dtype)
    trained = study.trained(jobs, runtime, work, config.jobs)
    write_rejects(config.rejects, rejects)
    operations = frozen.operations if frozen is not None else chosen(settled.ops)
    found = facts(
        settled, prepared, trained, operations, rejects, k=frozen.k if frozen else settled.k, seed=settings.seed
    )
    for said in found.warnings:
        work.progress.warn(said)
    work.measured["seconds"] = round(work.elapsed, 1)
    work.measured["peak_rss_mb"] = round(peak() / 1e6)
    work.measured["training_seconds"] = {f"{name}-{seed}": one.seconds for (name, seed), one in trained.items()}
    finished = {"summary": summary(found, work), "failed": _failed(config, found)}
    with work.publish(sources, lambda: finished) as folder:
        _write(folder, config, settled, work, prepared, trained, found)
    work.progress.show("\n".join(terminal(report.sections(found.told))))
    return finished


def _failed(config: Config, found: Facts) -> str | None:
    """What --fail-under finds fault with."""
    mean = found.told["accuracy"][found.main]["mean"]
    if config.fail_under is None or mean >= config.fail_under:
        return None
    return f"the accuracy is {mean:.3f}, below --fail-under {config.fail_under:g}"


def _write(
    folder: Path,
    config: Config,
    settled: Recipe,
    work: RunDirectory,
    prepared: Prepared,
    trained: Mapping[tuple[str, int], Trained],
    found: Facts,
) -> None:
    """The network and the policy of every seed, the record of all trainings, report and figures."""
    seeds = sorted(seed for name, seed in trained if name == found.main)
    for seed in seeds:
        place = folder if seed == seeds[0] else folder / "seeds" / str(seed)
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
        _write_one(place, settled, prepared, trained[found.main, seed], found)
    with atomic_file(folder / "metrics.jsonl") as file:
        for (name, seed), one in trained.items():
            for row in one.epochs:
                file.write(dumps({"train": name, "seed": seed, **row}) + b"\n")
    if found.history:
        write_history(folder / "policy_history.parquet", found.history, prepared.names, found.operations)
    with atomic_file(folder / "per_class.json") as file:
        file.write(orjson.dumps(found.told["per_class"], option=orjson.OPT_INDENT_2) + b"\n")
    with atomic_file(folder / "report.json") as file:
        file.write(orjson.dumps(found.told, option=orjson.OPT_INDENT_2) + b"\n")
    asked = {name: value for name, value in changed(config).items() if name not in _WITHOUT_EFFECT}
    about = {"images": ", ".join(work.inputs) or "builtin:digits", **asked}
    shown = figures.draw(_shown(prepared, trained, found), folder / "figures")
    with atomic_file(folder / "report.md") as file:
        file.write(markdown(report.TITLE, report.PREAMBLE, report.sections(found.told, shown), about).encode())


def _shown(prepared: Prepared, trained: Mapping[tuple[str, int], Trained], found: Facts) -> figures.Found:
    """What figures are drawn of."""
    names = list(found.told["accuracy"])
    seeds = found.told["seeds"]
    main = trained[found.main, seeds[0]]
    return figures.Found(
        metrics={name: {seed: trained[name, seed].epochs for seed in seeds} for name in names},
        history=found.history,
        operations=found.operations,
        classes=prepared.names,
        curriculum=report.curriculum(found.told["recipe"]),
        per_class=found.told["per_class"] if len(names) > 1 else None,
        strips=main.strips,
        strip_classes=[prepared.names[place] for place in main.shown],
    )


def _write_one(place: Path, settled: Recipe, prepared: Prepared, one: Trained, found: Facts) -> None:
    _, channels, height, width = prepared.images.shape
    shape = Shape(settled.net, channels, height, width, tuple(prepared.names), one.mean, one.std)
    write_model(place, one.network, shape)
    if one.policy is not None:
        epoch = kept_epoch(one, settled)
        about = {
            "k": settled.k,
            "jitter": settled.jitter,
            "temperature": settled.temperature,
            "hidden": settled.policy_hidden,
            "updates": one.epochs[epoch]["policy_updates"],
        }
        write_policy(
            place,
            one.policy,
            one.network,
            shape,
            operations=found.operations,
            chosen=choices(one, epoch),
            about=about,
        )
