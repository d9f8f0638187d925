"""Where a training has got to, as a file from which it goes on as if nothing had happened."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pomona.models.states import of_another, read_state, readable, write_state

WINDOW = 100
"""Steps that a reported loss is the mean of."""

_TENSORS = ("weights", "average", "first", "second")


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
        write_state(path, self.tensors(), about)

    def read(self, path: Path, fingerprint: str) -> None:
        """Become the state in `path`.

        Raises:
            MissingError: it is damaged.
            UsageError: it is of another training.
        """
        with readable(path):
            found, about = read_state(path)
            found = {name: found[name] for name in _TENSORS}
            step, losses, left = int(about["step"]), list(about["losses"]), list(about["open"])
            same = about["fingerprint"] == fingerprint
        if not same or any(found[name].shape != self.weights.shape for name in _TENSORS):
            raise of_another(path)
        for name, tensor in self.tensors().items():
            tensor.copy_(found[name])
        self.step, self.losses, self.open = step, losses, left
