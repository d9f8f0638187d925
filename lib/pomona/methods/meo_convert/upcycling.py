"""A model whose merge depends on its input, written from a dense one (sparse upcycling) or a mixture.

Every feed-forward map W of a dense model becomes n copies of itself, with noise where that is asked, and a gate that
knows nothing yet; gates sum to 1, so without noise the new model computes what the old one did. A mixture keeps its
experts and its router. All other tensors are copied as they are, and nothing is left over.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pomona.errors import CheckFailed, DataError, MissingError, UsageError
from pomona.io.atomic import writing
from pomona.methods.meo_convert import modeling_meo
from pomona.methods.meo_convert.config import Config, noise
from pomona.methods.meo_convert.families import Family, Linear, natural, resolved
from pomona.methods.meo_convert.modeling_meo import additions, auto_map, has_gate, keeps_bias
from pomona.methods.meo_convert.plan import format_of
from pomona.models.checkpoint import DTYPES, SHARD, Checkpoint, TensorSpec, write_config, write_shards
from pomona.runtime.progress import Progress
from pomona.runtime.seeds import derive

_ENCODERS = ("bert", "roberta")
_BOTH = ("t5", "bart", "switch_transformers")
_SELECTED = 2


@dataclass(frozen=True)
class Made:
    """A tensor of the output: what it is, what it is made from, and how."""

    spec: TensorSpec
    provenance: Mapping[str, Any]
    values: Callable[[], Tensor]


@dataclass(frozen=True)
class Plan:
    """What is written.

    Attributes:
        tensors: in order of their names, numbers as numbers.
        config: config.json.
        dropped: biases of the source that ``--compat reference`` loses.
    """

    tensors: list[Made]
    config: dict[str, Any]
    dropped: list[str]

    @property
    def specs(self) -> list[TensorSpec]:
        return [made.spec for made in self.tensors]


@dataclass(frozen=True)
class Upcycled:
    """What was written: the provenance of each tensor, config.json, names of files, and the biases dropped."""

    provenance: dict[str, dict[str, Any]]
    config: dict[str, Any]
    files: list[str]
    dropped: list[str]


def block(family: Family, config: Config, tokenizer: Any = None) -> dict[str, Any]:
    """The block "meo" of the output's config.json, as `modeling_meo` reads it.

    Args:
        tokenizer: of the source; the task level needs it for the description of the task.

    Raises:
        UsageError: the options do not suit the model.
        DataError: the source has been converted before.
    """
    if family.converted:
        raise DataError(
            "this model has been converted before: its experts are merged for each input already",
            hint="--train continues its training, --level task merges its experts",
        )
    mixture = family.kind == "mixture"
    level = "sequence" if config.level == "auto" else config.level
    experts = family.experts if mixture else config.experts
    selected = config.selected or (family.selected if mixture else min(_SELECTED, experts))
    if selected > experts:
        raise UsageError(f"--selected {selected} is more than the {experts} experts")
    if mixture and level == "task":
        raise UsageError("a mixture has no gates for a task", hint="--level task merges its experts once instead")
    return {
        "level": level,
        "experts": experts,
        "selected": selected,
        "run_as": config.run_as,
        "scope": _scope(family, config, level),
        "token_reduction": config.token_reduction,
        "compat": config.compat,
        "task_tokens": _task_tokens(config, tokenizer) if level == "task" else None,
        "mass": config.mass,
    }


def plan(checkpoint: Checkpoint, family: Family, meo: Mapping[str, Any], *, init: str, dtype: str, seed: int) -> Plan:
    """The output of giving the model experts as the block `meo` says; nothing is computed yet.

    Args:
        init: copy or noise:EPS.
        dtype: source, float32, bfloat16 or float16.

    Raises:
        MissingError: a map of the model is not in the checkpoint.
        DataError: a tensor belongs to a map, and nothing would take it.
    """
    settings = modeling_meo.Settings.read(meo)
    config = dict(checkpoint.config)
    if dtype != "source":
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    # Code that the source's auto_map points to knows nothing of experts.
    config |= {"meo": dict(meo), "auto_map": auto_map(resolved(checkpoint.config))}
    tensors: list[Made] = []
    taken: set[str] = set()
    dropped: list[str] = []
    if family.kind == "dense":
        _refuse_incomplete(checkpoint, family)
        for linear in family.linears:
            parts = [name for name in checkpoint.specs if name.startswith(f"{linear.name}.")]
            _refuse_leftovers(linear, parts)
            taken.update(parts)
            tensors += _experts(checkpoint, linear, settings, init, dtype, seed)
            if linear.bias and keeps_bias(family.name, settings.compat):
                tensors.append(_stack(checkpoint, f"{linear.name}.bias", False, settings, init, dtype, seed))
            elif linear.bias:
                dropped.append(f"{linear.name}.bias")
    elif settings.level == "token" and settings.run_as == "meo":
        for layer in family.layers:
            first = next(iter(layer.maps.values()))[0]
            held = checkpoint.specs[first.tensor].dtype
            width = int(resolved(checkpoint.config).hidden_size)
            tensors += _added(layer.block, width, settings, format_of(held, dtype), seed, only="token")
    tensors += [
        Made(
            TensorSpec(spec.name, held := format_of(spec.dtype, dtype), spec.shape),
            {"copied": spec.name},
            _copying(checkpoint, spec.name, held),
        )
        for spec in checkpoint.specs.values()
        if spec.name not in taken
    ]
    tensors.sort(key=lambda made: natural(made.spec.name))
    return Plan(tensors, config, sorted(dropped, key=natural))


def upcycle(planned: Plan, folder: Path, *, shard_bytes: int = SHARD, progress: Progress) -> Upcycled:
    """Write what was planned into `folder`: weights, config.json, and the modelling file it points to.

    Raises:
        CheckFailed: a number is not finite.
        OutputError: the disk is full.
    """
    made = {tensor.spec.name: tensor for tensor in planned.tensors}
    progress.start("writing experts", len(planned.specs))
    files = write_shards(
        folder, planned.specs, lambda name: made[name].values(), shard_bytes=shard_bytes, progress=progress
    )
    write_config(folder, planned.config)
    code = Path(modeling_meo.__file__)
    with writing(folder / code.name):
        shutil.copyfile(code, folder / code.name)
    provenance = {name: {"dtype": tensor.spec.dtype, **tensor.provenance} for name, tensor in made.items()}
    return Upcycled(provenance, planned.config, ["config.json", code.name, *files], planned.dropped)


def static_weights(checkpoint: Checkpoint, family: Family) -> dict[str, list[float]]:
    """The gates of every layer of a task-level model: the same for every input, so its experts can be merged once.

    Returns:
        (n,) by the layer's name, in double precision, sum 1.

    Raises:
        UsageError: the gates of this model depend on its input.
        CheckFailed: a gate is not finite.
    """
    settings = modeling_meo.Settings.read(checkpoint.config.get("meo", {}))
    if family.kind != "meo" or settings.level != "task":
        raise UsageError(
            "only at the task level are the gates the same for every input",
            hint="--weights uniform or router-frequency merges the experts of other models",
        )
    found: dict[str, list[float]] = {}
    for layer in family.layers:
        source = layer.name if has_gate(layer.name) else re.sub(r"up_proj$", "gate_proj", layer.name)
        with torch.random.fork_rng(()):
            modules = additions(settings, 1).double()
        names = {name: f"{source}.{name}" for name in modules.state_dict()}
        modules.load_state_dict({name: checkpoint.read(stored).double() for name, stored in names.items()})
        with torch.no_grad():
            scores = modules.eval()["gate"](modules["task"]()).scores[0]
        if not bool(scores.isfinite().all()):
            raise CheckFailed(f"the gates of {source} are not finite")
        found[layer.name] = scores.tolist()
    return found


# --- the block -------------------------------------------------------------------------------------------------------


def _scope(family: Family, config: Config, level: str) -> str:
    if family.name in _ENCODERS:
        if config.gate_scope not in (None, "sequence"):
            raise UsageError(
                f"--gate-scope {config.gate_scope} is for decoders; an encoder's gates see the whole sequence"
            )
        return "sequence"
    scope = config.gate_scope or "prompt"
    if scope == "sequence" and level != "task" and config.compat != "reference":
        raise UsageError(
            "--gate-scope sequence: the gates of a decoder would see the tokens it is to predict",
            hint="use prompt or segment:LEN; --compat reference allows it, to repeat the released code",
        )
    return scope


def _task_tokens(config: Config, tokenizer: Any) -> list[int]:
    if not (config.task_description or "").strip():
        raise UsageError(
            "--level task: the gates need a description of the task to see",
            hint='as --task-description "classify the sentiment of a review"',
        )
    if tokenizer is None:
        raise MissingError("--level task: the model has no tokenizer to read the description of the task with")
    tokens = list(tokenizer(config.task_description, add_special_tokens=False)["input_ids"])
    if not tokens:
        raise UsageError("--task-description: the tokenizer finds no token in it")
    return tokens


# --- checks ----------------------------------------------------------------------------------------------------------


def _refuse_leftovers(linear: Linear, parts: list[str]) -> None:
    known = {f"{linear.name}.weight", f"{linear.name}.bias"}
    if odd := sorted(set(parts) - known):
        raise DataError(
            f"tensor {odd[0]} belongs to {linear.name}, and its experts would not have it",
            hint="merge adapters into the weights and dequantise them first",
        )


def _refuse_incomplete(checkpoint: Checkpoint, family: Family) -> None:
    """Compare with the modules that transformers makes from config.json."""
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(resolved(checkpoint.config))
    there = {linear.name: linear for linear in family.linears}
    modules = dict(model.named_modules())
    for name in modeling_meo.maps(family.name, modules):
        # A checkpoint of a model with a head has the base model's names behind a prefix.
        stored = [found for found in there if found == name or found.endswith(f".{name}")]
        if not stored:
            raise MissingError(f"tensor {name}.weight is missing", hint="is the model complete?")
        if getattr(modules[name], "bias", None) is not None and not there[stored[0]].bias:
            raise MissingError(f"tensor {stored[0]}.bias is missing", hint="is the model complete?")
        expected = tuple(modules[name].weight.shape)
        if (shape := checkpoint.specs[f"{stored[0]}.weight"].shape) != expected:
            raise DataError(f"tensor {stored[0]}.weight has the shape {list(shape)}, config.json says {list(expected)}")
        del there[stored[0]]
    if there:
        raise DataError(f"tensor {next(iter(there))}.weight is of no layer that config.json tells of")


# --- tensors ---------------------------------------------------------------------------------------------------------


def _experts(
    checkpoint: Checkpoint, linear: Linear, settings: modeling_meo.Settings, init: str, dtype: str, seed: int
) -> list[Made]:
    """The experts of a linear map, and what it gains besides."""
    weight = f"{linear.name}.weight"
    stack = _stack(checkpoint, weight, linear.transposed, settings, init, dtype, seed)
    if not has_gate(linear.name):
        return [stack]
    return [stack, *_added(linear.name, stack.spec.shape[2], settings, stack.spec.dtype, seed)]


def _stack(
    checkpoint: Checkpoint,
    name: str,
    transposed: bool,
    settings: modeling_meo.Settings,
    init: str,
    dtype: str,
    seed: int,
) -> Made:
    spec, amount = checkpoint.specs[name], noise(init)
    shape = spec.shape[::-1] if transposed else spec.shape
    made = TensorSpec(name, format_of(spec.dtype, dtype), (settings.experts, *shape))
    told: dict[str, Any] = {"copies": name, "experts": settings.experts}
    if amount:
        told["noise"] = amount

    def values() -> Tensor:
        source = checkpoint.read(name)
        return copies(source.T if transposed else source, settings.experts, amount, seed, name, DTYPES[made.dtype])

    return Made(made, told, values)


def copies(source: Tensor, experts: int, amount: float, seed: int, name: str, dtype: torch.dtype) -> Tensor:
    """(n, ...) copies of `source`, each with Gaussian noise of its own of `amount` times the standard deviation."""
    stack = torch.empty((experts, *source.shape), dtype=dtype)
    if not amount:
        return stack.copy_(source.expand_as(stack))
    spread = amount * float(source.double().std(correction=0))
    for expert in range(experts):
        random = torch.Generator().manual_seed(derive(seed, f"{name}/expert/{expert}"))
        drawn = torch.randn(source.shape, generator=random, dtype=torch.float32)
        stack[expert] = drawn.mul_(spread).add_(source)
    return stack


def _added(place: str, width: int, settings: modeling_meo.Settings, held: str, seed: int, only: str = "") -> list[Made]:
    """What the map or block called `place`, of `width` inputs, gains besides experts, as it is before training."""
    with torch.random.fork_rng(()):
        torch.manual_seed(derive(seed, f"{place}/added"))
        state = additions(settings, width).state_dict()
    return [
        Made(
            TensorSpec(f"{place}.{name}", held, tuple(value.shape)),
            {"new": "drawn" if bool(value.any()) else "zeros"},
            functools.partial(value.to, DTYPES[held]),
        )
        for name, value in state.items()
        if name.startswith(only)
    ]


def _copying(checkpoint: Checkpoint, name: str, held: str) -> Callable[[], Tensor]:
    def values() -> Tensor:
        found = checkpoint.read(name)
        return found if found.dtype == DTYPES[held] else found.to(DTYPES[held])

    return values
