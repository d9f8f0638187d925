"""One merge: read the adapters, refuse what cannot be merged, merge, measure what it did, tune, publish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from pomona.errors import CheckFailed, UsageError
from pomona.io.atomic import atomic_file, writing
from pomona.io.directory import RunDirectory
from pomona.io.manifest import changed, file_digest
from pomona.io.writers import dumps
from pomona.methods.mera_merge import adapters as directories
from pomona.methods.mera_merge import compatibility, fusion, merging, quality, report, tracks
from pomona.methods.mera_merge.adapters import Adapter, with_sites
from pomona.methods.mera_merge.config import Config, parse_weights
from pomona.methods.mera_merge.facts import Ingredients, facts, summary
from pomona.methods.mera_merge.fewshot import study as fewshot
from pomona.methods.mera_merge.fewshot.summary import summarise
from pomona.methods.mera_merge.storage import write_tensors
from pomona.report.layers import layer_errors
from pomona.report.sections import markdown, terminal
from pomona.runtime.settings import Settings

_DONE = 0


def run(config: Config, settings: Settings, work: RunDirectory) -> tuple[dict[str, Any], int]:
    """Merge the adapters that `work` names; returns the summary for standard output and the exit code.

    Raises:
        PomonaError: as its class says; a drift above ``--max-drift`` is raised by `work` afterwards.
    """
    if settings.model is not None:
        raise UsageError("--model: the model that the adapters sit in is --base-model here")
    made_of = _ingredients(config, work)
    kind = made_of.adapters[0].kind
    if config.few_shot is not None and kind != "bottleneck":
        raise UsageError(f"--few-shot tunes bottleneck adapters; these are {merging.NAMES[kind]}")
    examples = fewshot.examples(config, settings.seed, settings.limit) if config.few_shot is not None else None
    if settings.dry_run:
        from pomona.methods.mera_merge import prediction  # which brings transformers; a merge alone does without

        told = {"method": made_of.method, "adapters": dict(zip(made_of.labels, made_of.weights, strict=True))}
        return told | prediction.predict(made_of, config, settings, examples), _DONE
    if work.path is None:
        raise UsageError("-o DIR is missing, the directory to write", hint="--dry-run prints the plan instead")
    base = quality.load_base(config, settings) if config.base_model is not None else None
    sources = [entry for adapter in made_of.adapters for entry in adapter.inputs]
    sources += base.sources if base else []
    files = [path for path in (config.tracks, config.few_shot, config.test) if path is not None]
    sources += [{"name": path.name, **file_digest(path)} for path in files]
    finished = work.finished_before(sources)
    if finished is None:
        work.open_journal({"settings": work.described, "sources": sources})
        finished = _publish(config, settings, work, made_of, base, examples, sources)
    else:
        work.progress.warn(f"{work.path} is finished already")
    if finished["failed"]:
        work.fail_afterwards(CheckFailed(finished["failed"], hint="report.md shows where; --max-drift sets the bound"))
    return finished["summary"], _DONE


def serve(config: Config, settings: Settings) -> None:
    """This process's share of a launch: none, as a merge takes seconds and tunes one adapter at a time."""


def _ingredients(config: Config, work: RunDirectory) -> Ingredients:
    """The adapters to merge, their weights and the method; what cannot be merged is refused."""
    if not work.inputs:
        raise UsageError("no adapter is named", hint="give their directories, with names as in first=adapters/one")
    read = [directories.read(argument, allow_pickle=config.allow_pickle) for argument in work.inputs]
    by_label = tracks.read(config.tracks) if config.tracks is not None else None
    choice = tracks.choose(read, by_label, config.track, config.cross_track)
    (work.progress.warn if choice.crossed else work.progress.note)(choice.said)
    chosen = [read[place] for place in choice.places]
    compatibility.check(chosen, allow_resize=config.allow_resize)
    method = merging.method_of(config, chosen[0].kind)
    weights = parse_weights(config.weights)
    if weights is not None and len(weights) == len(read):
        weights = [weights[place] for place in choice.places]  # given for all that are named
    shares = fusion.shares(weights, len(chosen), method=method, normalize=config.normalize)
    return Ingredients(chosen, method, shares, choice.said)


def _publish(
    config: Config,
    settings: Settings,
    work: RunDirectory,
    made_of: Ingredients,
    base: quality.Base | None,
    examples: fewshot.Examples | None,
    sources: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Merge, measure, tune and write; what the manifest keeps of it."""
    activations = None
    if made_of.method == "acts":
        assert base is not None, "the options were checked"
        activations = quality.activations(base, made_of.adapters, config.act, work.progress)
    place = merging.reference_of(config, made_of.method, made_of.adapters, activations)
    merged = merging.merge(made_of.adapters, config, made_of.method, made_of.weights, place, activations)
    if made_of.method == "linear" and len(made_of.adapters) > 1:
        work.progress.warn(
            "linear sums the factors of LoRA adapters one by one, which leaves cross terms between adapters: the "
            f"merged maps are up to {max(merged.deviations.values()):.0%} off; --method delta-svd sums the maps"
        )
    finished: dict[str, Any] = {}
    with work.publish(sources, lambda: finished) as folder:
        directories.write(folder, merged.adapter)
        written = directories.read(f"merged={folder}", allow_pickle=False)  # what is measured is what is there
        found = facts(config, made_of, merged, written, made_of.labels[place], base, work.progress)
        found["few_shot"] = None
        if examples is not None:
            assert base is not None, "the options were checked"
            found["few_shot"] = _few_shot(config, settings, work, made_of, base, examples, written, folder)
        finished["summary"] = summary(found, str(work.path))
        finished["failed"] = _failed(config, found)
        finished["tensors"] = merged.provenance
        _write(folder, found, config, work)
    work.progress.show("\n".join(terminal(report.sections(found))))
    return finished


def _failed(config: Config, found: Mapping[str, Any]) -> str | None:
    """What --max-drift finds fault with."""
    if config.max_drift is None:
        return None
    reference = found["reference"]
    drift = found["drift"][reference]["relative"]
    if drift <= config.max_drift:
        return None
    return f"the outputs drift by {drift:.3g} from those with {reference}, above --max-drift {config.max_drift:g}"


def _few_shot(
    config: Config,
    settings: Settings,
    work: RunDirectory,
    made_of: Ingredients,
    base: quality.Base,
    examples: fewshot.Examples,
    written: Adapter,
    folder: Path,
) -> dict[str, Any]:
    """Every arm on every draw; the merged adapter, as the first draw tuned it, goes into the folder ``tuned``."""
    average = None
    if config.baselines and len(made_of.adapters) > 1 and made_of.method != "avg":
        average = merging.average(made_of.adapters, made_of.weights)
    study = fewshot.Study(
        config,
        examples,
        base.loaded.model,
        base.loaded.tokenizer,
        made_of.adapters,
        written,
        average,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    rows = fewshot.run_few_shot(study, work.journal, work.progress, work.measured)
    _write_tuned(folder / "tuned", study.tuned(), written, examples.names, config.pooling)
    tests = len(examples.draws[0].rest)
    told = {"shots": config.shots, "labels": examples.names, "draws": config.seeds, "tests": tests}
    return told | {"arms": summarise(rows), "rows": rows}


def _write_tuned(folder: Path, tuned: fewshot.Tuned, written: Adapter, names: Sequence[str], pooling: str) -> None:
    """The adapter in the format of the merged one, and its head, which AdapterHub has no name for, beside it."""
    directories.write(folder, with_sites(written, tuned.sites, "tuned"))
    write_tensors(folder / "linear_head.safetensors", dict(tuned.head.state_dict()))
    with atomic_file(folder / "linear_head.json") as file:
        file.write(dumps({"labels": list(names), "pooling": pooling}) + b"\n")


def _write(folder: Path, found: Mapping[str, Any], config: Config, work: RunDirectory) -> None:
    """Report, figures and model card."""
    with atomic_file(folder / "report.json") as file:
        file.write(orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n")
    about = {"adapters": ", ".join(each["label"] for each in found["adapters"]), **changed(config)}
    with atomic_file(folder / "report.md") as file:
        file.write(markdown(report.TITLE, report.PREAMBLE, report.sections(found), about).encode())
    with atomic_file(folder / "README.md") as file:
        file.write(report.card(found, work.command, [config, work.settings.decisive()]).encode())
    if found["sites"]:
        with writing(folder):
            (folder / "figures").mkdir()
        layer_errors(
            folder / "figures/sites", "Error at every site", list(found["sites"]), list(found["sites"].values())
        )
