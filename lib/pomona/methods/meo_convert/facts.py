"""What is known of a conversion: everything report.json holds, in plain numbers and words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pomona.io.manifest import plain
from pomona.io.writers import brief
from pomona.methods.meo_convert.config import Config
from pomona.methods.meo_convert.conversion import Converted
from pomona.methods.meo_convert.families import Family
from pomona.methods.meo_convert.operations import operations
from pomona.methods.meo_convert.routing import Routing
from pomona.methods.meo_convert.training import TrainingResult
from pomona.methods.meo_convert.verification import Verdict
from pomona.models.checkpoint import Checkpoint, parameters
from pomona.report.cards import stated_licence


def facts(
    checkpoint: Checkpoint,
    family: Family,
    config: Config,
    made: Converted,
    written: Checkpoint,
    verdict: Verdict | None,
    routing: Mapping[str, Routing] | None,
    *,
    source: str,
    spoken: bool,
) -> dict[str, Any]:
    """What report.json holds, but for training.

    Args:
        written: the output.
        source: what people call the source.
        spoken: whether the models were run on text, not on random tokens.
    """
    meo = made.config.get("meo") or {"experts": 1, "selected": family.selected}
    return {
        "action": made.action,
        "family": family.name,
        "source": source,
        "licence": stated_licence(checkpoint.folder),
        "arch": made.arch,
        "architecture": _architecture(made.config),
        "level": meo.get("level", "task"),
        "scope": meo.get("scope"),
        "experts": {"before": family.experts, "after": meo["experts"], "selected": meo["selected"]},
        "unprompted": verdict is not None and _unprompted(meo, made.config),
        "weights": made.weights,
        "mass_kept": config.mass == "keep",
        "compat": config.compat if made.action == "upcycle" else None,
        "dropped": list(made.dropped),
        "mass": {name: found.mass for name, found in (routing or {}).items()},
        "parameters": {"before": parameters(checkpoint.specs.values()), "after": parameters(written.specs.values())},
        "bytes": {"before": _bytes(checkpoint), "after": _bytes(written)},
        "flops": operations(checkpoint.config, made.config),
        "alignment": dict(made.alignment),
        "cosine": dict(made.cosine),
        "drift": verdict and _drift(verdict, spoken),
        "layers": dict(verdict.layers) if verdict else {},
        "layers_of_experts": bool(verdict and verdict.of_experts),
        "spoken": spoken,
        "usage": {name: found.frequency.tolist() for name, found in (routing or {}).items()},
    }


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """What standard output gets of the facts `found`."""
    drift = found["drift"]
    told: dict[str, Any] = {
        "action": found["action"],
        "arch": found["arch"],
        "experts": found["experts"],
        "flops": {name: found["flops"]["128"][name] for name in ("before", "after")},
        "drift": drift and {n: brief(drift[n]) for n in ("maximum", "relative", "divergence", "agreement")},
        "perplexity": drift and {n: brief(drift[f"perplexity_{n}"]) for n in ("before", "after")},
    }
    if found["training"]:
        told["training"] = {
            when: {name: brief(found["training"][when][name]) for name in ("accuracy", "nll", "perplexity")}
            for when in ("before", "after")
        }
    return told


def trained(found: Mapping[str, Any], result: TrainingResult, written: Checkpoint) -> dict[str, Any]:
    """The facts `found` before training, with it, and with what it altered: a classifier gets a head of its own.

    Args:
        written: the output.
    """
    return {
        **found,
        "training": plain(result),
        "architecture": _architecture(written.config),
        "parameters": {**found["parameters"], "after": parameters(written.specs.values())},
        "bytes": {**found["bytes"], "after": _bytes(written)},
    }


def retraced(provenance: Mapping[str, Any], written: Checkpoint) -> dict[str, Any]:
    """Where each tensor of the trained model `written` began: as `provenance` says, or in a head that was drawn."""
    return {
        spec.name: {**provenance.get(spec.name, {"new": "drawn"}), "dtype": spec.dtype, "trained": True}
        for spec in written.specs.values()
    }


def _architecture(config: Mapping[str, Any]) -> str | None:
    """The class of transformers that config.json names."""
    return next((str(name) for name in config.get("architectures") or ()), None)


def _unprompted(meo: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether the gates of a decoder see its first token alone where nothing is generated, as `modeling_meo` says."""
    merges = meo.get("scope") == "prompt" and meo.get("run_as") == "meo" and meo.get("level") != "task"
    return merges and not (_architecture(config) or "").endswith("ForSequenceClassification")


def _drift(verdict: Verdict, spoken: bool) -> dict[str, Any]:
    found: dict[str, Any] = plain(verdict.drift)
    if not spoken and found["no_perplexity"] is None:
        found |= dict.fromkeys(("perplexity_before", "perplexity_after"))
        found["no_perplexity"] = "random tokens have none that would mean anything"
    return found


def _bytes(checkpoint: Checkpoint) -> int:
    return sum(file.stat().st_size for file in checkpoint.files)
