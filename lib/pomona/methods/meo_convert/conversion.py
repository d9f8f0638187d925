"""What becomes of a model: its experts merged once, or made and kept for merging input by input."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pomona.errors import UsageError
from pomona.io.atomic import writing
from pomona.methods.meo_convert import modeling_meo, prediction, static, upcycling, weighting
from pomona.methods.meo_convert.config import Config, ExpertOptions, TrainingOptions, size
from pomona.methods.meo_convert.expert_alignment import Alignment
from pomona.methods.meo_convert.families import Family, resolved
from pomona.methods.meo_convert.layouts import Role
from pomona.methods.meo_convert.operations import operations
from pomona.methods.meo_convert.plan import plan
from pomona.methods.meo_convert.routing import Routing
from pomona.models.checkpoint import Checkpoint, parameters, required, write_config, write_shards
from pomona.runtime.progress import Progress

Action = Literal["merge", "upcycle", "keep", "copy"]
"""Merge experts once; make experts of a dense model; keep a mixture's for merging; copy a converted model to train."""


@dataclass(frozen=True)
class Converted:
    """What was written, and what is known of the experts.

    Attributes:
        arch: single-expert or dense-twin of a merge, else what the model runs as: meo or moe.
        config: config.json.
        provenance: of each tensor of the output.
        merged: of a merge, by layer, the names of the merged maps by role.
        cosine: of a merge, by layer, the mean cosine between two experts.
        alignment: by layer cost_before, cost_after and moved; empty where nothing was matched.
        weights: of a merge, what the experts were weighted by.
        dropped: biases that the released code loses.
    """

    action: Action
    arch: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    merged: Mapping[str, Mapping[Role, str]] = field(default_factory=dict)
    cosine: Mapping[str, float | None] = field(default_factory=dict)
    alignment: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    weights: str | None = None
    dropped: tuple[str, ...] = ()


def action(family: Family, config: Config) -> Action:
    """What `config` asks to do with a model of `family`.

    Raises:
        UsageError: the options do not go together, or not with this model.
    """
    dynamic = config.level in ("sequence", "token")
    if family.kind == "dense":
        chosen: Action = "upcycle"
    elif family.converted and config.train is not None and config.level == "auto":
        chosen = "copy"
    else:
        chosen = "keep" if dynamic else "merge"
    _refuse_idle(chosen, config)
    return chosen


_MERGING = ("arch", "weights", "align", "reference_expert")
_EXPERTS = tuple(option.name for option in fields(ExpertOptions))
_TRAINING = tuple(option.name for option in fields(TrainingOptions) if option.name not in ("train", "max_length"))


def _refuse_idle(chosen: Action, config: Config) -> None:
    """An option that would do nothing is a mistake of whoever gave it."""

    def given(names: Iterable[str]) -> str | None:
        defaults = {option.name: option.default for option in fields(config)}
        found = next((name for name in names if getattr(config, name) != defaults[name]), None)
        return found and f"--{found.replace('_', '-')}"

    if chosen != "merge" and (flag := given(_MERGING)):
        raise UsageError(f"{flag} is for merging experts once; this keeps them", hint="--level task merges them")
    if chosen == "merge" and (flag := given(_EXPERTS)):
        raise UsageError(f"{flag} is for keeping experts; this merges them once", hint="--level sequence keeps them")
    if chosen == "copy" and (flag := given(_EXPERTS)):
        raise UsageError(
            f"{flag} was decided when this model was converted; its training goes on", hint="convert its source again"
        )
    if chosen == "keep" and (flag := given(("experts", "init"))):
        raise UsageError(f"{flag} is for making experts of a dense model; this one has experts")
    if chosen == "merge" and config.align == "none" and (flag := given(("reference_expert",))):
        raise UsageError(f"{flag} is for matching experts", hint="--align weights or activations does that")
    if chosen in ("upcycle", "keep") and config.level != "task" and (flag := given(("task_description",))):
        raise UsageError(f"{flag} is for --level task")
    if config.train is None and (flag := given(_TRAINING)):
        raise UsageError(f"{flag} is for training", hint="--train FILE trains")


def check(family: Family, config: Config) -> None:
    """See that what `config` names is there and fits, before any work.

    Raises:
        PomonaError: as `action`, `weighting.weights` and `weighting.references` do.
    """
    if action(family, config) == "merge":
        if config.weights is not None and config.weights.endswith(".json"):
            weighting.weights(family, config.weights)
        if config.align != "none":
            weighting.references(family, config.reference_expert, None)


def convert(
    checkpoint: Checkpoint,
    family: Family,
    config: Config,
    folder: Path,
    *,
    routing: Mapping[str, Routing] | None,
    tokenizer: Any,
    seed: int,
    progress: Progress,
) -> Converted:
    """Do what `action` says and write the model into `folder`, tokenizer and all.

    Args:
        routing: of a mixture on calibration text, where weights, masses or matching need it.

    Raises:
        PomonaError: as its class says.
    """
    chosen = action(family, config)
    if chosen == "merge":
        made = _merge(checkpoint, family, config, folder, routing, progress)
    elif chosen == "copy":
        made = _copy(checkpoint, config, folder, progress)
    else:
        block = upcycling.block(family, config, tokenizer)
        planned = upcycling.plan(checkpoint, family, block, init=config.init, dtype=config.save_dtype, seed=seed)
        done = upcycling.upcycle(planned, folder, shard_bytes=size(config.shard_size), progress=progress)
        made = Converted(chosen, config.run_as, done.config, done.provenance, dropped=tuple(done.dropped))
    for companion in checkpoint.companions():
        with writing(folder / companion.name):
            shutil.copyfile(companion, folder / companion.name)
    return made


def _merge(
    checkpoint: Checkpoint,
    family: Family,
    config: Config,
    folder: Path,
    routing: Mapping[str, Routing] | None,
    progress: Progress,
) -> Converted:
    if config.weights is None and _at_task_level(checkpoint, family):
        told, weights = (
            "the gates of the source, trained at the task level",
            upcycling.static_weights(checkpoint, family),
        )
    else:
        told = config.weights or "uniform"
        weights = weighting.weights(family, told, routing)
    alignment = None
    if config.align != "none":
        alignment = Alignment(
            config.align,
            weighting.references(family, config.reference_expert, routing),
            {name: found.inputs for name, found in (routing or {}).items()},
            activation(checkpoint),
        )
    done = static.convert(
        checkpoint,
        family,
        arch=config.arch,
        weights=weights,
        align=alignment,
        mass=weighting.mass(family, config.mass, routing),
        folder=folder,
        shard_bytes=size(config.shard_size),
        dtype=config.save_dtype,
        progress=progress,
    )
    return Converted("merge", done.arch, done.config, done.provenance, done.merged, done.cosine, done.alignment, told)


def _copy(checkpoint: Checkpoint, config: Config, folder: Path, progress: Progress) -> Converted:
    specs = list(checkpoint.specs.values())
    progress.start("copying", len(specs))
    write_shards(folder, specs, checkpoint.read, shard_bytes=size(config.shard_size), progress=progress)
    write_config(folder, checkpoint.config)
    code = Path(modeling_meo.__file__)
    with writing(folder / code.name):
        shutil.copyfile(code, folder / code.name)
    provenance = {spec.name: {"dtype": spec.dtype, "copied": spec.name} for spec in specs}
    return Converted("copy", str(checkpoint.config["meo"].get("run_as", "meo")), checkpoint.config, provenance)


def _at_task_level(checkpoint: Checkpoint, family: Family) -> bool:
    return family.kind == "meo" and checkpoint.config["meo"].get("level") == "task"


def activation(checkpoint: Checkpoint) -> str:
    """The nonlinearity inside the experts, by its name in transformers."""
    config = resolved(checkpoint.config)
    return str(getattr(config, "hidden_act", None) or getattr(config, "dense_act_fn", "relu"))


def foretold(
    checkpoint: Checkpoint, family: Family, config: Config, tokenizer: Any, *, seed: int, batch_size: int
) -> dict[str, Any]:
    """Bytes, tensors, parameters, memory and operations of what `convert` would write.

    Args:
        batch_size: texts of a step of training, if there is to be any.
    """
    chosen = action(family, config)
    if chosen == "merge":
        output = plan(checkpoint, family, arch=config.arch, dtype=config.save_dtype).config
        told = prediction.predict(checkpoint, family, config)
    else:
        specs, output = list(checkpoint.specs.values()), checkpoint.config
        if chosen != "copy":
            block = upcycling.block(family, config, tokenizer)
            planned = upcycling.plan(checkpoint, family, block, init=config.init, dtype=config.save_dtype, seed=seed)
            specs, output = planned.specs, planned.config
        before, after = parameters(checkpoint.specs.values()), parameters(specs)
        told = {
            "arch": output["meo"]["run_as"],
            "bytes": required(specs, size(config.shard_size)),
            "tensors": len(specs),
            "parameters": {"before": before, "after": after},
            **prediction.of_upcycling(
                list(checkpoint.specs.values()),
                specs,
                read=output["meo"]["selected"] if chosen == "upcycle" else None,
                verified=config.verify != "none",
                batch=batch_size if config.train is not None else None,
                logits=(logits := prediction.logits_of(checkpoint, config)),
                learnt=0 if config.label_field else logits,
            ),
        }
    return {"action": chosen, **told, "flops": operations(checkpoint.config, output)}
