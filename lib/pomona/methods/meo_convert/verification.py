"""What a conversion did, measured: the source and the output side by side on calibration text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pomona.methods.meo_convert import routing
from pomona.methods.meo_convert.config import Config
from pomona.methods.meo_convert.conversion import Converted, activation
from pomona.methods.meo_convert.damage import block_errors
from pomona.methods.meo_convert.families import Family
from pomona.methods.meo_convert.loading import load
from pomona.models import drift, texts
from pomona.models.checkpoint import Checkpoint
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Progress
from pomona.runtime.seeds import derive
from pomona.runtime.settings import Settings

QUICK = 8
"""Texts that --verify quick measures on."""

_KEPT = 512  # tokens on which a layer's experts are looked at
_RANDOM = 16  # texts of random tokens, for a model without a tokenizer
_BATCH = 8


@dataclass
class Bench:
    """The source, loaded when it is first needed, and what it is run on.

    Attributes:
        dtype: that models are run in; float32 unless another was asked for, as differences are looked for.
        batches: of calibration text; of random tokens where the model has no tokenizer.
        spoken: whether they are text.
    """

    checkpoint: Checkpoint
    family: Family
    runtime: Runtime
    dtype: torch.dtype
    tokenizer: Any
    batches: list[drift.Batch]
    spoken: bool
    _model: Any = field(default=None, repr=False)
    _routing: Mapping[str, routing.Routing] | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        family: Family,
        tokenizer: Any,
        config: Config,
        settings: Settings,
        runtime: Runtime,
    ) -> Bench:
        """Read the calibration text of `config`.

        Raises:
            MissingError: the file is not there.
            DataError: it holds no text.
        """
        dtype = torch.float32 if settings.dtype == "auto" else runtime.dtype
        if tokenizer is None:
            vocabulary = int(checkpoint.config.get("vocab_size", 2))
            drawn = np.random.Generator(np.random.Philox(derive(settings.seed, "random tokens")))
            ids = torch.from_numpy(drawn.integers(0, vocabulary, (_RANDOM, min(64, config.max_length))))
            made = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.split(ids, _BATCH)]
            return cls(checkpoint, family, runtime, dtype, None, made, spoken=False)
        read = texts.read_texts(config.calib, config.calib_samples)
        made = drift.batches(tokenizer, read, max_length=config.max_length, batch_size=_BATCH)
        return cls(checkpoint, family, runtime, dtype, tokenizer, made, spoken=True)

    @property
    def model(self) -> Any:
        """The source, as transformers runs it."""
        if self._model is None:
            self._model, _ = load(self.checkpoint.folder, dtype=self.dtype, device=self.runtime.device)
        return self._model

    def release(self) -> None:
        """Let the memory of the loaded source go."""
        self._model = None

    def routing(self) -> Mapping[str, routing.Routing] | None:
        """What the routers of a mixture do on all batches, token by token; None of other models."""
        if self.family.kind != "mixture":
            return None
        if self._routing is None:
            mixture = self._plain() if self.family.converted else self.model
            self._routing = routing.statistics(mixture, self.batches, keep=_KEPT)
        return self._routing

    def _plain(self) -> Any:
        return load(self.checkpoint.folder, dtype=self.dtype, device=self.runtime.device, plain=True)[0]


@dataclass(frozen=True)
class Verdict:
    """How far the output is from the source.

    Attributes:
        layers: by layer, the error of the merged experts on what the layer sees, or of the hidden states behind it.
        of_experts: whether it is the former.
    """

    drift: drift.Drift
    layers: Mapping[str, float]
    of_experts: bool


def verify(bench: Bench, made: Converted, folder: Path, how: str, progress: Progress) -> Verdict:
    """Run the source and what was written into `folder` on the bench's text.

    Args:
        how: quick or full.

    Raises:
        MissingError: what was written cannot be loaded.
        CheckFailed: an output is not finite.
    """
    source = bench.model  # first, as messages should tell of the user's own directory
    written, _ = load(folder, dtype=bench.dtype, device=bench.runtime.device)
    found = drift.measure(source, written, _some(bench.batches, how), progress=progress)
    del written
    seen = bench.routing()
    if made.action == "merge" and seen is not None:
        errors = block_errors(Checkpoint.open(folder), made.merged, seen, activation(bench.checkpoint))
        return Verdict(found, errors, of_experts=True)
    return Verdict(found, dict(zip(found.names, found.layers, strict=True)), of_experts=False)


def _some(batches: Sequence[drift.Batch], how: str) -> list[drift.Batch]:
    if how == "full":
        return list(batches)
    left, chosen = QUICK, []
    for batch in batches:
        chosen.append({name: tensor[:left] for name, tensor in batch.items()})
        left -= len(chosen[-1]["input_ids"])
        if left <= 0:
            break
    return chosen
