"""What one training has come to, as a file: a run that is interrupted does not train it again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pomona.methods.madaug_train.training import Trained
from pomona.models.states import part, read_state, readable, write_state

_PLAIN = ("shown", "mean", "std", "parts", "epochs", "updates", "seconds")


def write(path: Path, trained: Trained) -> None:
    """Replace `path` by what `trained` holds.

    Raises:
        CheckFailed: a number is not finite.
        OutputError: the disk is full, or the file cannot be written.
    """
    tensors = {f"network.{name}": value for name, value in trained.network.items()}
    tensors |= {f"policy.{name}": value for name, value in (trained.policy or {}).items()}
    tensors |= {f"strips.{name}": torch.from_numpy(value) for name, value in trained.strips.items()}
    tensors |= {"predictions": torch.from_numpy(trained.predictions), "history": torch.from_numpy(trained.history)}
    write_state(path, tensors, {name: getattr(trained, name) for name in _PLAIN})


def read(path: Path) -> Trained:
    """What `write` has written.

    Raises:
        MissingError: it is damaged.
    """
    with readable(path, "training"):
        tensors, about = read_state(path)
        return Trained(
            network=part(tensors, "network."),
            policy=part(tensors, "policy.") or None,
            strips={name: value.numpy() for name, value in part(tensors, "strips.").items()},
            predictions=tensors["predictions"].numpy(),
            history=tensors["history"].numpy(),
            **{name: _frozen(about[name]) for name in _PLAIN},
        )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and value and isinstance(value[0], float) else value
