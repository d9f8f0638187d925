"""Where a training has got to, as a file: tensors, and beside them what is no tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pomona.errors import MissingError, UsageError
from pomona.io.atomic import atomic_file, writing
from pomona.models.checkpoint import write_mapping

_ABOUT = "training"


def write_state(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Replace `path` by these tensors and what is told `about` them.

    Raises:
        OutputError: the disk is full, or the file cannot be written.
        CheckFailed: a number in a tensor is not finite.
        ValueError: one in `about` is not.
    """
    told = json.dumps(about, allow_nan=False)
    with atomic_file(path) as file, writing(path):
        write_mapping(file, tensors, about={_ABOUT: told})


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` has written; read it, and use it for the first time, inside `readable`."""
    with safe_open(path, "pt") as file:
        about: dict[str, Any] = json.loads((file.metadata() or {})[_ABOUT])
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@contextmanager
def readable(path: Path, what: str = "state of a training") -> Iterator[None]:
    """Whatever a damaged file makes fail inside the block is raised as `MissingError`."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise MissingError(f"{path}: no {what} can be read from it", hint="--overwrite begins again") from error


def of_another(path: Path) -> UsageError:
    """What to raise of a state that other images or options have led to."""
    return UsageError(
        f"{path} is of a training with other images or options", hint="--overwrite forgets it and begins again"
    )
