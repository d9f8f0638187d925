"""Where a training has got to, as a file from which it goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pomona.models.states import of_another, read_state, readable, write_state


@dataclass
class State:
    """A training after some steps; random numbers are no part of it, as those of a step follow from its number.

    Attributes:
        tensors: all numbers that change, by name; they keep their shapes, and are changed in place.
        step: steps done.
        updates: steps of the policy among them.
        rows: what is told of the epochs that are over.
    """

    tensors: Mapping[str, Tensor]
    step: int = 0
    updates: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """What of the state is no tensor."""
        return {"step": self.step, "updates": self.updates, "rows": self.rows}

    def become(self, told: Mapping[str, Any]) -> None:
        """Take over what another state `told`."""
        self.step, self.updates, self.rows = int(told["step"]), int(told["updates"]), list(told["rows"])

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
        write_state(path, self.tensors, {"fingerprint": fingerprint, **self.told()})

    def read(self, path: Path, fingerprint: str) -> None:
        """Become the state in `path`.

        Raises:
            MissingError: it is damaged.
            UsageError: it is of another training.
        """
        with readable(path):
            found, about = read_state(path)
            same = about["fingerprint"] == fingerprint
            if same:
                for name, tensor in self.tensors.items():
                    tensor.copy_(found[name])
                self.become(about)
        if not same:
            raise of_another(path)
