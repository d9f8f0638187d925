"""Files of adapters: JSON objects and tensors, read from what may be hostile and written the same way every time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pomona.errors import DataError, MissingError
from pomona.io.atomic import writing


class Stored(NamedTuple):
    """What the files of an adapter hold beside ``adapter_config.json``.

    Attributes:
        kind: bottleneck, lora or ia3.
        tensors: of the adapter, by their names in the file.
        head: of its prediction head, likewise.
        head_config: the head's configuration, where it is a file of its own.
        files: all that were read.
        base: what the configuration calls the base model.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    head_config: Mapping[str, Any] | None
    files: Sequence[Path]
    base: str | None


def read_json(path: Path, label: str) -> dict[str, Any]:
    """The object in `path`, a file of the adapter `label`.

    Raises:
        MissingError: it cannot be read, or is no JSON.
        DataError: it is no object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise MissingError(f"adapter {label}: {path.name} is damaged: {_line(error)}") from error
    if not isinstance(value, dict):
        raise DataError(f"adapter {label}: {path.name} holds no object")
    return value


def read_tensors(
    path: Path, label: str, *, pickle: Path | None = None, allow_pickle: bool = False
) -> dict[str, Tensor]:
    """The tensors of the safetensors file `path`, or where it is absent and that is allowed, of `pickle`.

    Raises:
        MissingError: there is no file, it is damaged, or a pickle that may not be read.
        DataError: the pickle holds something else than named tensors.
    """
    if path.is_file():
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.offset_keys()}
        except (SafetensorError, OSError, ValueError) as error:
            raise MissingError(f"adapter {label}: {path.name} is damaged: {_line(error)}") from error
    if pickle is None or not pickle.is_file():
        raise MissingError(f"adapter {label}: {path.name} is missing")
    if not allow_pickle:
        raise MissingError(
            f"adapter {label}: its weights are a pickle ({pickle.name}), which can run code when loaded",
            hint="--allow-pickle reads pytorch_adapter.bin by torch's weights-only loader",
        )
    return _unpickled(pickle, label)


def _unpickled(path: Path, label: str) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it likes for a damaged file; a refused pickle is an UnpicklingError
        raise MissingError(
            f"adapter {label}: {path.name} is damaged, or holds more than tensors, and was not loaded"
        ) from error
    if not isinstance(value, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        for name, tensor in value.items()
    ):
        raise DataError(f"adapter {label}: {path.name} holds something else than named tensors")
    return {name: tensor.detach().contiguous() for name, tensor in value.items()}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as both libraries do: keys sorted, two spaces deep.

    Raises:
        OutputError: the file cannot be written.
    """
    with writing(path):
        path.write_text(json.dumps(value, indent=2, sort_keys=True), encoding="utf-8")


def encoded(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """`tensors` as the content of a safetensors file."""
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # none may share memory
    content: bytes = safetensors.torch.save(whole, None if metadata is None else dict(metadata))
    return content


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` as safetensors.

    Raises:
        OutputError: the file cannot be written.
    """
    write_files(path.parent, {path.name: encoded(tensors)})


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files`, by name.

    Raises:
        OutputError: a file cannot be written.
    """
    for name, content in files.items():
        with writing(folder / name):
            (folder / name).write_bytes(content)


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
