"""What a conversion will take, before anything is written: bytes on the disk and memory at its peak."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pomona.methods.meo_convert.config import Config, size
from pomona.methods.meo_convert.families import Family
from pomona.methods.meo_convert.layouts import ExpertLayer
from pomona.methods.meo_convert.plan import Copied, Merged, Output, plan
from pomona.methods.meo_convert.static import BLOCK
from pomona.methods.meo_convert.weighting import needs_routing
from pomona.models.checkpoint import DTYPES, Checkpoint, TensorSpec, parameters, required
from pomona.runtime import memory

_BLOCKS = 3 * 8 * BLOCK  # a block of experts in float64, what is made of it, and its sum
_MODELLING = 40_000_000  # what running a model adds, weights and logits apart
_TEXTS = 8  # in a batch that is run
_COMPARED = 5  # logits of two models, those at real tokens, and what is in between
_LEARNT = 4  # logits, their logarithms and gradients
_TRAINED = 20  # a parameter, its gradient, two moments of AdamW, and what was kept last, in float32
_MB = 1e6


def predict(checkpoint: Checkpoint, family: Family, config: Config, *, itemsize: int = 4) -> dict[str, Any]:
    """What a static merge takes.

    Args:
        itemsize: bytes of a number in a model that is loaded to be run.

    Returns:
        bytes: of the files of weights, exactly.
        tensors, merged: how many are written, how many of them are sums over experts.
        parameters: before and after.
        peak_rss_mb: peak memory of the process in megabytes, which is that of the conversion, or of routing and
            verification, for which transformers loads the models: `stages` has each.

    Raises:
        UsageError: the family has no such architecture.
    """
    planned = plan(checkpoint, family, arch=config.arch, dtype=config.save_dtype)
    source, target = list(checkpoint.specs.values()), planned.specs
    loaded = _MODELLING + _loaded(source, itemsize, packed=family.layout == "per-expert")
    logits = itemsize * logits_of(checkpoint, config)
    stages = {"conversion": _conversion(checkpoint, planned.outputs, config.align != "none")}
    if needs_routing(family, config):
        stages["routing"] = loaded + logits
    if config.verify != "none":
        written = _loaded(target, itemsize, packed=planned.arch == "single-expert")
        stages["verification"] = loaded + written + _COMPARED * logits
    if config.train is not None:
        learnt = 0 if config.label_field else _LEARNT * logits
        stages["training"] = _MODELLING + _TRAINED * parameters(target) + learnt
    return {
        "arch": planned.arch,
        "bytes": required(target, size(config.shard_size)),
        "tensors": len(planned.outputs),
        "merged": sum(isinstance(output, Merged) for output in planned.outputs),
        "parameters": {"before": parameters(source), "after": parameters(target)},
        **_peak(stages),
    }


def of_upcycling(
    source: Sequence[TensorSpec],
    specs: Sequence[TensorSpec],
    *,
    read: int | None = None,
    verified: bool,
    batch: int | None = None,
    logits: int = 0,
    learnt: int = 0,
    itemsize: int = 4,
) -> dict[str, Any]:
    """Memory that writing `specs` takes, and running or training what was written.

    Args:
        source: tensors of the source.
        specs: of the output.
        read: experts of a stack that any input selects, where it is known: fresh gates select the same for all.
        verified: whether both models are run.
        batch: texts of a step of training, each of which merges experts of its own; None without training.
        logits: of a batch, as `logits_of`.
        learnt: of a batch in training.

    Returns:
        peak_rss_mb and stages, as `predict`.
    """
    stages = {"conversion": max(_stacking(spec) for spec in specs)}
    stacks = [spec for spec in specs if len(spec.shape) == 3]
    if verified:
        models = _loaded(source, itemsize) + _loaded(specs, itemsize)
        stages["verification"] = _MODELLING + models + _COMPARED * itemsize * logits
        if read is not None and _mapped(specs, itemsize):
            stages["verification"] -= sum(spec.bytes // spec.shape[0] * (spec.shape[0] - read) for spec in stacks)
    if batch is not None:
        merged = sum(spec.elements // spec.shape[0] for spec in stacks)
        more = itemsize * (batch * merged + _LEARNT * learnt)
        stages["training"] = _MODELLING + _TRAINED * parameters(specs) + more
    return _peak(stages)


def logits_of(checkpoint: Checkpoint, config: Config) -> int:
    """Logits of a batch of the longest texts; 0 of a model without a language-modelling head."""
    named = next(iter(checkpoint.config.get("architectures") or ()), "")
    if not named.endswith(("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration")):
        return 0
    return _TEXTS * config.max_length * int(checkpoint.config.get("vocab_size", 0))


def _peak(stages: dict[str, int]) -> dict[str, Any]:
    """`stages` in megabytes on top of what the process has now, when all libraries but models are loaded."""
    held = memory.peak()
    told = {name: round((held + needed) / _MB, 1) for name, needed in stages.items()}
    return {"peak_rss_mb": max(told.values()), "stages": told}


def _conversion(checkpoint: Checkpoint, outputs: Sequence[Output], aligned: bool) -> int:
    """Bytes that the tensor which takes most needs while it is made."""
    return max(
        _merging(output, aligned) if isinstance(output, Merged) else _copying(checkpoint, output) for output in outputs
    )


def _merging(output: Merged, aligned: bool) -> int:
    matching = _matching(output.layer) if aligned else 0
    return max(matching, output.spec.bytes * (2 if output.layer.transposed else 1) + _BLOCKS)


def _matching(layer: ExpertLayer) -> int:
    """Two experts' maps in float64 and the costs of every pair of units, which the solver copies."""
    width, inputs = layer.maps["up"][0].shape
    return 8 * (4 * width * inputs + 4 * width * width)


def _copying(checkpoint: Checkpoint, output: Output) -> int:
    held = checkpoint.specs[output.source] if isinstance(output, Copied) else None
    if held is None:
        return output.spec.bytes
    return held.bytes + (output.spec.bytes if held.dtype != output.spec.dtype else 0)


def _stacking(spec: TensorSpec) -> int:
    """A stack of experts, the mapped map it is made from and that in float64; of others the mapped source."""
    return spec.bytes + (12 * spec.elements // spec.shape[0] if len(spec.shape) == 3 else 0)


def _loaded(specs: Sequence[TensorSpec], itemsize: int, *, packed: bool = False) -> int:
    """A model as transformers holds it: the mapped file, or, if it converts or packs what it reads, that and a copy."""
    held = sum(spec.bytes for spec in specs)
    return held if _mapped(specs, itemsize) and not packed else held + itemsize * parameters(specs)


def _mapped(specs: Iterable[TensorSpec], itemsize: int) -> bool:
    """Whether numbers stay as they are in the file when they are loaded."""
    return all(spec.bytes == itemsize * spec.elements for spec in specs if DTYPES[spec.dtype].is_floating_point)
