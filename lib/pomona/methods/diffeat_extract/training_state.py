"""Where a training has got to, as a file from which it goes on as if nothing had happened."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pomona.errors import MissingError, UsageError
from pomona.io.atomic import atomic_file, writing
from pomona.models.checkpoint import TensorSpec, write_tensors

WINDOW = 100
"""Steps that a reported loss is the mean of."""

_TENSORS = ("weights", "average", "first", "second")
_ABOUT = "training"


@dataclass
class State:
    """A training after some steps; random numbers are no part of it, as those of a step follow from its number.

    Attributes:
        weights: of the model, one after another, float32, (P,).
        average: their moving average, likewise.
        first, second: AdamW's moments of the gradient, likewise.
        step: steps done.
        losses: means over the windows that are complete.
        open: losses of the steps since.
    """

    weights: Tensor
    average: Tensor
    first: Tensor
    second: Tensor
    step: int = 0
    losses: list[float] = field(default_factory=list)
    open: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, weights: Tensor) -> State:
        """Before the first step."""
        return cls(weights, weights.clone(), torch.zeros_like(weights), torch.zeros_like(weights))

    def add(self, loss: float) -> None:
        """Count a step that had this loss."""
        self.step += 1
        self.open.append(loss)
        if len(self.open) == WINDOW:
            self.losses.append(math.fsum(self.open) / WINDOW)
            self.open.clear()

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSORS}

    def write(self, path: Path, fingerprint: str) -> None:
        """Replace `path` by this state of the training that `fingerprint` tells from others.

        Raises:
            OutputError: the disk is full, or the file cannot be written.
            CheckFailed: a number is not finite.
        """
        about = {"fingerprint": fingerprint, "step": self.step, "losses": self.losses, "open": self.open}
        specs = [TensorSpec(name, "F32", tuple(self.weights.shape)) for name in _TENSORS]
        with atomic_file(path) as file, writing(path):
            write_tensors(file, specs, lambda name: self.tensors()[name].cpu(), about={_ABOUT: json.dumps(about)})

    def read(self, path: Path, fingerprint: str) -> None:
        """Become the state in `path`.

        Raises:
            MissingError: it is damaged.
            UsageError: it is of another training.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})[_ABOUT])
                found = {name: file.get_tensor(name) for name in _TENSORS}
            step, losses, left = int(about["step"]), list(about["losses"]), list(about["open"])
            same = about["fingerprint"] == fingerprint
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise MissingError(
                f"{path}: no state of a training can be read from it", hint="--overwrite begins again"
            ) from error
        if not same or any(found[name].shape != self.weights.shape for name in _TENSORS):
            raise UsageError(
                f"{path} is of a training with other images or options",
                hint="--overwrite forgets it and begins again",
            )
        for name, tensor in self.tensors().items():
            tensor.copy_(found[name])
        self.step, self.losses, self.open = step, losses, left
