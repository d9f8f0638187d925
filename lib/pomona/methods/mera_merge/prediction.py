"""What a merge will write and take, foretold by merging in memory: that is a matter of a second."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from pomona.methods.mera_merge import adapters as directories
from pomona.methods.mera_merge import costs, merging
from pomona.methods.mera_merge.adapters import Adapter
from pomona.methods.mera_merge.config import Config
from pomona.methods.mera_merge.facts import Ingredients
from pomona.methods.mera_merge.fewshot.study import Examples
from pomona.methods.mera_merge.quality import BATCH, check_length
from pomona.methods.mera_merge.storage import encoded
from pomona.models import drift, texts
from pomona.models.loading import directory, load_config, load_tokenizer
from pomona.runtime import memory
from pomona.runtime.settings import Settings

_FIGURES = 45_000_000  # what drawing adds to the process
_MODELLING = 130_000_000  # what transformers adds before it has read a weight, and PEFT beside it
_TUNED_WHOLE = 4  # copies of the base: parameters, gradients, two moments of AdamW


def predict(made_of: Ingredients, config: Config, settings: Settings, examples: Examples | None) -> dict[str, Any]:
    """What a merge comes to.

    Returns:
        parameters: of the adapters together, and of the merged one.
        bytes: of all files of tensors, exactly.
        peak_rss_mb: peak memory of the process in megabytes.
        flops: by tokens, before and after, as `costs.table`.

    Raises:
        PomonaError: what the merge would raise.
    """
    method = made_of.method
    if method == "acts":  # shapes and work are those of wts, and nothing is run through the base
        method, config = "wts", dataclasses.replace(config, method="wts", solver="exact")
    place = merging.reference_of(config, method, made_of.adapters, None)
    merged = merging.merge(made_of.adapters, config, method, made_of.weights, place, None).adapter
    running = _running(config, settings, made_of.adapters) if config.base_model is not None else 0
    modelling = _MODELLING if running else 0
    peak = memory.peak() + _FIGURES + modelling + running
    return {
        "parameters": {"before": sum(map(costs.parameters, made_of.adapters)), "after": costs.parameters(merged)},
        "bytes": _written(merged, settings, examples),
        "peak_rss_mb": round(peak / 1e6),
        "flops": costs.table(made_of.adapters, merged),
    }


def _written(merged: Adapter, settings: Settings, examples: Examples | None) -> int:
    """Of the merged adapter, and where it is tuned, of the tuned one with its head."""
    if examples is None:
        return directories.size(merged)
    site = next(iter(merged.sites().values()))
    dtype = getattr(torch, "float32" if settings.dtype == "auto" else settings.dtype)
    labels, width = len(examples.names), site.up.shape[0]
    head = {"weight": torch.zeros(labels, width, dtype=dtype), "bias": torch.zeros(labels, dtype=dtype)}
    return 2 * directories.size(merged) + len(encoded(head))


def _running(config: Config, settings: Settings, adapters: Sequence[Adapter]) -> int:
    """Bytes of the base and of what it puts out on the widest batch, twice as two models are compared."""
    assert config.base_model is not None, "the caller has looked"
    place = directory(config.base_model)
    weights = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    described = load_config(config.base_model)
    check_length(config, described)
    read = drift.batches(
        load_tokenizer(config.base_model),
        texts.read_texts(config.calib, config.calib_samples),
        max_length=config.max_length,
        batch_size=settings.batch_size or BATCH,
    )
    spoken = any("LM" in name for name in described.architectures or ())
    a_token: int = described.hidden_size * described.num_hidden_layers + (described.vocab_size if spoken else 0)
    # The outputs at real tokens are kept of both models, the second one's as it gave them besides.
    compared = 4 * a_token * (read[0]["input_ids"].numel() + 2 * int(read[0]["attention_mask"].sum()))
    seen = 0
    if config.method == "acts":
        units = sum(len(site.down) for adapter in adapters for site in adapter.sites().values())
        seen = 4 * units * sum(int(batch["attention_mask"].sum()) for batch in read)
    whole = _TUNED_WHOLE * weights if config.few_shot is not None and config.baselines else 0
    return weights + max(compared + seen, whole)
