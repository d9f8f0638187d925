"""Model directories read and written one tensor at a time, so that memory does not grow with the model.

Reading maps the bytes of one tensor, or of a part of it, for as long as the result lives. Writing puts the header of a
file first (all names, shapes and offsets are known beforehand) and appends the tensors one by one.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pomona.errors import CheckFailed, DataError, MissingError
from pomona.io.atomic import writing
from pomona.io.manifest import file_digest
from pomona.io.tensors import header
from pomona.runtime.progress import Progress

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Number formats by the names that safetensors has for them."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Formats that can be summed."""
SHARD = 5_000_000_000
"""Bytes of the largest file of weights that transformers writes."""

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_BLOCK = 1 << 22  # elements looked at and written at a time: the pages of a mapped tensor pass through, none is copied


@dataclass(frozen=True)
class TensorSpec:
    """Name, number format (as safetensors writes it: F32, BF16, F16, ...) and shape of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class _Place:
    """The file of a tensor, and where in it the tensor's bytes begin."""

    file: Path
    begin: int


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its configuration, and what tensors it has.

    Attributes:
        folder: the directory.
        config: config.json as read.
        specs: by name, in the order of the files and of the tensors in them.
        files: the files of weights.
    """

    folder: Path
    config: dict[str, Any]
    specs: dict[str, TensorSpec]
    files: tuple[Path, ...]
    _places: Mapping[str, _Place]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of a model directory, or of one ``.safetensors`` file with config.json beside it.

        Raises:
            MissingError: a file is absent or damaged, the index and the files disagree, the weights are a pickle.
            DataError: a tensor's number format is none of `DTYPES`.
        """
        given = folder
        alone = folder.is_file() and folder.suffix == ".safetensors"
        folder = folder.parent if alone else folder
        if not folder.is_dir():
            raise MissingError(f"model {folder}: no such directory")
        config = json_object(folder / _CONFIG, "is this a transformers model directory?")
        index = None
        if alone:
            files = [given]
        elif (folder / _WEIGHTS).is_file():
            files = [folder / _WEIGHTS]  # transformers prefers it to an index, too
        else:
            index = _index(folder)
            files = [folder / name for name in sorted(set(index.values()))]
        specs: dict[str, TensorSpec] = {}
        places: dict[str, _Place] = {}
        for file in files:
            for spec, begin in _header(file):
                if index is not None and index.get(spec.name) != file.name:
                    raise MissingError(
                        f"model {folder}: {_INDEX} and {file.name} disagree on {spec.name}",
                        hint="are the files of one download?",
                    )
                specs[spec.name] = spec
                places[spec.name] = _Place(file, begin)
        if index is not None and (lacking := [name for name in index if name not in specs]):
            raise MissingError(
                f"model {folder}: {len(lacking)} tensors of {_INDEX} are in no file, among them {lacking[0]}"
            )
        return cls(folder, config, specs, tuple(files), places)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, memory-mapped: changing it changes a private copy, never the file."""
        return self.span(name, 0, self._spec(name).elements).reshape(self._spec(name).shape)

    def span(self, name: str, start: int, count: int) -> Tensor:
        """`count` elements of the flattened tensor `name` from `start` on; only their bytes are mapped."""
        spec, place = self._spec(name), self._places[name]
        dtype = DTYPES[spec.dtype]
        if not 0 <= start <= start + count <= spec.elements:
            raise ValueError(f"{name} has {spec.elements} elements, not {start + count}")
        if count == 0:
            return torch.empty(0, dtype=dtype)
        begin = place.begin + start * dtype.itemsize
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        try:
            with place.file.open("rb") as file:
                mapped = mmap.mmap(
                    file.fileno(), begin - page + count * dtype.itemsize, access=mmap.ACCESS_COPY, offset=page
                )
        except (OSError, ValueError) as error:
            raise MissingError(f"{place.file}: cannot be read: {error}") from error
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=count * dtype.itemsize, offset=begin - page)
        return (raw if begin % dtype.itemsize == 0 else raw.clone()).view(dtype)

    def inputs(self) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of every file that decides the output: configuration, weights, companions."""
        index = [self.folder / _INDEX] if (self.folder / _INDEX).is_file() else []
        decisive = sorted({self.folder / _CONFIG, *index, *self.files, *self.companions()})
        try:
            return [{"name": file.name, **file_digest(file)} for file in decisive]
        except OSError as error:
            raise MissingError(f"model {self.folder}: cannot be read: {error}") from error

    def companions(self) -> list[Path]:
        """Files of the tokenizer and of generation, which stand beside the weights whatever becomes of these."""
        return [self.folder / name for name in _COMPANIONS if (self.folder / name).is_file()]

    def _spec(self, name: str) -> TensorSpec:
        if name not in self.specs:
            raise MissingError(f"model {self.folder}: tensor {name} is missing", hint="is the model complete?")
        return self.specs[name]


def write_shards(
    folder: Path,
    specs: Sequence[TensorSpec],
    tensor: Callable[[str], Tensor],
    *,
    shard_bytes: int = SHARD,
    progress: Progress | None = None,
) -> list[str]:
    """Write the tensors `specs` into `folder`: model.safetensors, or several files and their index.

    Args:
        tensor: gives a tensor by its name, as its specification says; asked once for each, in the order of the files.
        shard_bytes: bytes of tensors in a file at most; a larger tensor has a file of its own.
        progress: is advanced by each tensor.

    Returns:
        The names of the files.

    Raises:
        CheckFailed: a tensor holds a number that is not finite.
        OutputError: the disk is full, or the folder cannot be written.
    """
    shards = _shards(specs, shard_bytes)
    names = _names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        path = folder / name
        with writing(path), path.open("wb") as file:
            write_tensors(file, shard, tensor, progress=progress)
    if len(names) > 1:
        with writing(folder / _INDEX):
            (folder / _INDEX).write_bytes(_encoded_index(shards, names))
        names.append(_INDEX)
    return names


def write_tensors(
    file: BinaryIO,
    specs: Sequence[TensorSpec],
    tensor: Callable[[str], Tensor],
    *,
    about: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the tensors of `specs` as one safetensors file, in their order.

    Args:
        tensor: gives the tensor of a name, as its spec says, on the CPU.
        about: what the file's metadata say, besides that its tensors are torch's.
        progress: told of every tensor.

    Raises:
        CheckFailed: a number in a floating-point tensor is not finite.
    """
    file.write(_encoded_header(specs, about))
    for spec in specs:
        _append(file, spec, tensor(spec.name))
        if progress is not None:
            progress.advance()


def write_mapping(file: BinaryIO, tensors: Mapping[str, Tensor], *, about: Mapping[str, str] | None = None) -> None:
    """As `write_tensors`, of tensors that are all there, wherever they are."""
    specs = [TensorSpec(name, dtype_name(value.dtype), tuple(value.shape)) for name, value in tensors.items()]
    write_tensors(file, specs, lambda name: tensors[name].cpu().contiguous(), about=about)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, as transformers does: sorted keys, two blanks of indentation."""
    with writing(folder / _CONFIG):
        (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n", "utf-8")


def required(specs: Sequence[TensorSpec], shard_bytes: int = SHARD) -> int:
    """Bytes of the files that `write_shards` would write."""
    shards = _shards(specs, shard_bytes)
    index = len(_encoded_index(shards, _names(len(shards)))) if len(shards) > 1 else 0
    return index + sum(len(_encoded_header(shard)) + sum(spec.bytes for spec in shard) for shard in shards)


def parameters(specs: Iterable[TensorSpec]) -> int:
    """Floating-point numbers in the tensors `specs`."""
    return sum(spec.elements for spec in specs if DTYPES[spec.dtype].is_floating_point)


def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls `dtype`."""
    return next(name for name, known in DTYPES.items() if known == dtype)


# --- reading ---------------------------------------------------------------------------------------------------------


def json_object(path: Path, hint: str | None = None) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Raises:
        MissingError: it is missing or damaged; `hint` is for the first.
    """
    if not path.is_file():
        raise MissingError(f"model {path.parent}: {path.name} is missing", hint=hint)
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise MissingError(f"model {path.parent}: {path.name} is damaged") from error
    if not isinstance(found, dict):
        raise MissingError(f"model {path.parent}: {path.name} is damaged: it is no JSON object")
    return found


def _index(folder: Path) -> dict[str, str]:
    """The file of each tensor."""
    if not (folder / _INDEX).is_file():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise MissingError(
                f"model {folder}: its weights are a pickle ({pickles[0]}), which can run code when loaded",
                hint="convert it to safetensors on a machine where you trust it: model.save_pretrained(FOLDER)",
            )
        raise MissingError(f"model {folder}: {_WEIGHTS} is missing")
    placed = json_object(folder / _INDEX, "").get("weight_map")
    if not (
        isinstance(placed, dict)
        and placed
        and all(isinstance(name, str) and Path(name).name == name for name in placed.values())
    ):
        raise MissingError(f"model {folder}: {_INDEX} is damaged")
    if lacking := sorted({name for name in placed.values() if not (folder / name).is_file()}):
        shards = len(set(placed.values()))
        raise MissingError(f"model {folder}: {len(lacking)} of {shards} shards missing: {', '.join(lacking[:5])}")
    return placed


def _header(path: Path) -> Iterator[tuple[TensorSpec, int]]:
    """Every tensor of a safetensors file, in the order of its bytes, with the offset of its first one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy"):  # which refuses a header whose offsets overlap, leave holes or pass the end
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise MissingError(
            f"{path}: not a whole safetensors file: {_first_line(error)}", hint="was the download cut short?"
        ) from error
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        if entry["dtype"] not in DTYPES:
            raise DataError(
                f"{path}: tensor {name} has the number format {entry['dtype']}", hint=f"known: {', '.join(DTYPES)}"
            )
        yield TensorSpec(name, entry["dtype"], tuple(entry["shape"])), 8 + length + entry["data_offsets"][0]


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


# --- writing ---------------------------------------------------------------------------------------------------------


def _shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """`specs` in files of at most `shard_bytes`, in order; in a file, wide numbers stand first, so all are aligned."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.bytes
    return [sorted(shard, key=lambda spec: -DTYPES[spec.dtype].itemsize) for shard in shards]


def _names(count: int) -> list[str]:
    return [_WEIGHTS] if count == 1 else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]


def _encoded_header(shard: Sequence[TensorSpec], about: Mapping[str, str] | None = None) -> bytes:
    return header([(spec.name, spec.dtype, spec.shape) for spec in shard], {"format": "pt", **(about or {})})


def _encoded_index(shards: Sequence[Sequence[TensorSpec]], names: Sequence[str]) -> bytes:
    placed = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
    entry = {
        "metadata": {"total_size": sum(spec.bytes for shard in shards for spec in shard)},
        "weight_map": dict(sorted(placed.items())),
    }
    return json.dumps(entry, indent=2).encode() + b"\n"


def _append(file: BinaryIO, spec: TensorSpec, values: Tensor) -> None:
    if dtype_name(values.dtype) != spec.dtype or tuple(values.shape) != spec.shape:
        raise ValueError(f"{spec.name}: {values.dtype} {tuple(values.shape)} instead of {spec.dtype} {spec.shape}")
    for block in torch.split(values.detach().contiguous().flatten(), _BLOCK):
        if spec.dtype in FLOATS and block.numel() and not _finite(block):
            raise CheckFailed(f"tensor {spec.name} holds numbers that are not finite")
        file.write(block.view(torch.uint8).numpy().data)


def _finite(block: Tensor) -> bool:
    """Whether all of `block` is finite: NaN passes into the extremes, and nothing is allocated."""
    low, high = block.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())
