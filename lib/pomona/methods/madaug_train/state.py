"""Where a training has got to, as a file from which it goes on as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pomona.errors import MissingError, UsageError
from pomona.io.atomic import atomic_file, writing
from pomona.models.checkpoint import TensorSpec, dtype_name, write_tensors

_ABOUT = "training"


@dataclass
class State:
    """A training after some steps; random numbers are no part of it, as those of a step follow from its number.

    Attributes:
        tensors: all numbers that change, by name; they keep their shapes, and are changed in place.
        step: steps done.
        updates: steps of the policy among them.
        best: highest validation accuracy so far, where the weights of the best epoch are wanted.
        rows: what is told of the epochs that are over.
    """

    tensors: Mapping[str, Tensor]
    step: int = 0
    updates: int = 0
    best: float | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """What of the state is no tensor."""
        return {"step": self.step, "updates": self.updates, "best": self.best, "rows": self.rows}

    def become(self, told: Mapping[str, Any]) -> None:
        """Take over what another state `told`."""
        self.step, self.updates = int(told["step"]), int(told["updates"])
        self.best, self.rows = told["best"], list(told["rows"])

    def share(self, device: torch.device) -> None:
        """Become, in every process of a launch, the state that the main one has."""
        told = [self.told()]
        torch.distributed.broadcast_object_list(told, src=0)
        self.become(told[0])
        for tensor in self.tensors.values():
            placed = tensor.to(device)
            torch.distributed.broadcast(placed, src=0)
            tensor.copy_(placed)

    def write(self, path: Path, fingerprint: str) -> None:
        """Replace `path` by this state of the training that `fingerprint` tells from others.

        Raises:
            OutputError: the disk is full, or the file cannot be written.
            CheckFailed: a number is not finite.
        """
        about = json.dumps({"fingerprint": fingerprint, **self.told()}, allow_nan=False)
        specs = [TensorSpec(name, dtype_name(value.dtype), tuple(value.shape)) for name, value in self.tensors.items()]
        with atomic_file(path) as file, writing(path):
            write_tensors(file, specs, lambda name: self.tensors[name].cpu(), about={_ABOUT: about})

    def read(self, path: Path, fingerprint: str) -> None:
        """Become the state in `path`.

        Raises:
            MissingError: it is damaged.
            UsageError: it is of another training.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})[_ABOUT])
                same = about["fingerprint"] == fingerprint
                found = {name: file.get_tensor(name) for name in self.tensors} if same else {}
            if same:
                for name, tensor in self.tensors.items():
                    tensor.copy_(found[name])
                self.become(about)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
            raise MissingError(
                f"{path}: no state of a training can be read from it", hint="--overwrite begins again"
            ) from error
        if not same:
            raise UsageError(
                f"{path} is of a training with other images or options",
                hint="--overwrite forgets it and begins again",
            )
