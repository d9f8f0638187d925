"""Training shared by the processes of a launch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pomona.errors import MissingError
from pomona.io.labelled import Labelled
from pomona.methods.meo_convert.config import TrainingOptions
from pomona.methods.meo_convert.loading import load
from pomona.methods.meo_convert.training import BATCH, TrainingResult, train
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Progress


@dataclass(frozen=True)
class Job:
    """What a process needs to know to train its part: the model's directory, texts to train on and to measure with."""

    folder: Path
    labelled: Labelled
    test: Labelled
    config: TrainingOptions
    seed: int
    batch_size: int = BATCH


class Launch:
    """Trains in every process of `runtime`: the main one calls `train`, the others wait in ``runtime.serve()``."""

    def __init__(self, runtime: Runtime, progress: Progress) -> None:
        self._runtime, self._progress = runtime, progress
        self._model: Any = None
        self._tokenizer: Any = None
        runtime.register("train", self._share)

    def train(self, job: Job) -> tuple[Any, Any, TrainingResult]:
        """The trained model, its tokenizer, and what training did.

        Raises:
            PomonaError: as `load` and `train` do.
        """
        results = self._runtime.map("train", [job] * self._runtime.world)
        return self._model, self._tokenizer, results[0]

    def _share(self, job: Job) -> TrainingResult:
        runtime = self._runtime
        model, tokenizer = load(
            job.folder, dtype=torch.float32, device=runtime.device, labels=job.labelled.names, seed=job.seed
        )
        if tokenizer is None:
            raise MissingError(f"model {job.folder}: it has no tokenizer to train with")
        self._model, self._tokenizer = model, tokenizer
        return train(
            model,
            tokenizer,
            job.labelled,
            job.test,
            job.config,
            runtime,
            self._progress,
            seed=job.seed,
            batch_size=job.batch_size,
        )
