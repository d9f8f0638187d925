"""What one training has come to, as a file: a run that is interrupted does not train it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pomona.errors import MissingError
from pomona.io.atomic import atomic_file, writing
from pomona.methods.madaug_train.training import Trained
from pomona.models.checkpoint import TensorSpec, dtype_name, write_tensors

_ABOUT = "training"
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
    specs = [TensorSpec(name, dtype_name(value.dtype), tuple(value.shape)) for name, value in tensors.items()]
    about = {name: getattr(trained, name) for name in _PLAIN}
    with atomic_file(path) as file, writing(path):
        told = json.dumps(about, allow_nan=False)
        write_tensors(file, specs, lambda name: tensors[name].cpu().contiguous(), about={_ABOUT: told})


def read(path: Path) -> Trained:
    """What `write` has written.

    Raises:
        MissingError: it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})[_ABOUT])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Trained(
            network=_part(tensors, "network."),
            policy=_part(tensors, "policy.") or None,
            strips={name: value.numpy() for name, value in _part(tensors, "strips.").items()},
            predictions=tensors["predictions"].numpy(),
            history=tensors["history"].numpy(),
            **{name: _frozen(about[name]) for name in _PLAIN},
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MissingError(f"{path}: no training can be read from it", hint="--overwrite begins again") from error


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and value and isinstance(value[0], float) else value
