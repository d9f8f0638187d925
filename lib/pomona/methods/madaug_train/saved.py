"""Files of a run that outlive it: the network, and the policy, which can be read, compared and used elsewhere.

A policy is two files. ``policy.json`` is for people: one line an operation, with its range and how often and how
strongly the policy chose it on the images to learn from, so that two policies can be compared line by line.
``policy.safetensors`` holds its weights beside those of the network whose features it reads, so that it stands alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate

from pomona.errors import MissingError, UsageError
from pomona.io.atomic import writing
from pomona.io.manifest import file_digest
from pomona.methods.madaug_train.config import MOST_HIDDEN, network
from pomona.methods.madaug_train.networks import Network, build
from pomona.methods.madaug_train.normalisation import normalised, statistics
from pomona.methods.madaug_train.operations.table import OPERATIONS, Operation
from pomona.methods.madaug_train.policy import Policy
from pomona.models.checkpoint import json_object, write_config, write_mapping
from pomona.models.states import part

MODEL, POLICY, ABOUT = "model.safetensors", "policy.safetensors", "policy.json"

_CONFIG = "config.json"
_FORMAT = "pomona-madaug-policy-1"
_CLASSIFIER = "classifier."
_SIDE, _CLASSES = 1 << 14, 10**6  # the most pixels across, and classes, that a network is believed to have

_Module = TypeVar("_Module", bound=torch.nn.Module)


@dataclass(frozen=True)
class Shape:
    """What a network is built for, and what it is fed.

    Attributes:
        net: its name, as wrn-40-2.
        names: of the classes, in the order of its outputs.
        mean, std: of each channel of the images in [0, 1], which they are normalised by.
    """

    net: str
    channels: int
    height: int
    width: int
    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def build(self) -> Network:
        return build(self.net, self.channels, len(self.names), min(self.height, self.width), 0)


@dataclass(frozen=True)
class Classifier:
    """A trained network, read back.

    Attributes:
        sources: name, size and SHA-256 of each file.
    """

    shape: Shape
    module: Network
    sources: list[dict[str, Any]]

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """(B, classes) of uint8 images (B, C, H, W)."""
        with statistics(self.module, "eval"):
            found: Tensor = self.module(normalised(images, self.shape.mean, self.shape.std))
        return found


@dataclass(frozen=True)
class Frozen:
    """A policy with the network whose features it reads; neither learns any more.

    Attributes:
        operations: what it chooses from.
        k: operations applied to an image.
        jitter: most that a drawn magnitude is moved by.
        temperature: of the softmax.
    """

    shape: Shape
    operations: tuple[Operation, ...]
    k: int
    jitter: float
    temperature: float
    module: Network
    policy: Policy
    sources: list[dict[str, Any]]

    @torch.inference_mode()
    def outlook(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and magnitudes, (B, K) each, for uint8 images (B, C, H, W) of any size and channels."""
        with statistics(self.module, "eval"):
            fitted = normalised(_fitted(images, self.shape), self.shape.mean, self.shape.std)
            found: tuple[Tensor, Tensor] = self.policy(self.module.features(fitted))
        return found

    def to(self, device: torch.device) -> Frozen:
        """The same on `device`."""
        self.module.to(device)
        self.policy.to(device)
        return self


def write_model(folder: Path, weights: Mapping[str, Tensor], shape: Shape) -> None:
    """Write config.json and model.safetensors; the same network gives the same bytes.

    Raises:
        CheckFailed: a weight is not finite.
        OutputError: the disk is full, or the folder cannot be written.
    """
    write_config(folder, asdict(shape))
    _write(folder / MODEL, weights)


def read_model(folder: Path) -> Classifier:
    """The network of a run.

    Raises:
        MissingError: it is not there, or damaged.
    """
    shape = _shape(json_object(folder / _CONFIG, "is this the directory of a finished run?"), folder)
    module = _loaded(shape.build, _tensors(folder / MODEL), folder)
    files = [folder / _CONFIG, folder / MODEL]
    return Classifier(shape, module, [_source(path) for path in files])


def write_policy(
    folder: Path,
    policy: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    shape: Shape,
    *,
    operations: Sequence[Operation],
    chosen: Sequence[Mapping[str, float]],
    about: Mapping[str, Any],
) -> None:
    """Write policy.json and policy.safetensors.

    Args:
        policy: weights of the policy.
        weights: of the network whose features it reads.
        chosen: probability, magnitude and strength of each operation, means over classes of the images to learn from.
        about: k, jitter, temperature, hidden (layers), updates, and what else a reader is to know.

    Raises:
        CheckFailed: a weight is not finite.
        OutputError: the disk is full, or the folder cannot be written.
    """
    features = {f"network.{name}": value for name, value in weights.items() if not name.startswith(_CLASSIFIER)}
    _write(folder / POLICY, features | {f"policy.{name}": value for name, value in policy.items()})
    rows = [{**asdict(each), **told} for each, told in zip(operations, chosen, strict=True)]
    lines = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in rows)
    source = {"model_sha256": file_digest(folder / MODEL)["sha256"]} if (folder / MODEL).is_file() else {}
    head = {"format": _FORMAT, **about, "features": "after global average pooling", **source, "network": asdict(shape)}
    told = json.dumps(head, indent=2, allow_nan=False, ensure_ascii=False)
    with writing(folder / ABOUT):
        (folder / ABOUT).write_text(f'{told[:-2]},\n  "operations": [\n{lines}\n  ]\n}}\n', "utf-8")


def read_policy(folder: Path) -> Frozen:
    """The policy of a run, or of a directory that holds its two files.

    Raises:
        MissingError: it is not there, or damaged, or of an operation that is not known, or makes nothing finite of
            an image.
    """
    if folder.name == ABOUT:
        folder = folder.parent
    about = json_object(folder / ABOUT, "--policy takes a run with a learned policy, or a directory with policy.json")
    shape = _shape(about.get("network"), folder)
    known = {operation.name: operation for operation in OPERATIONS}
    try:
        if about["format"] != _FORMAT:
            raise ValueError
        operations = tuple(known[row["name"]] for row in about["operations"])
        k, hidden = _whole(about["k"], 1, len(operations)), _whole(about["hidden"], 0, MOST_HIDDEN)
        jitter, temperature = _number(about["jitter"]), _number(about["temperature"])
        if len(operations) != len(set(operations)) or not 0 <= jitter <= 1 or temperature <= 0:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise MissingError(f"{folder / ABOUT}: not a policy that this version reads") from error
    tensors = _tensors(folder / POLICY)
    module = _loaded(replace(shape, names=shape.names[:1]).build, part(tensors, "network."), folder, _CLASSIFIER)
    policy = _loaded(lambda: Policy(module.width, len(operations), hidden), part(tensors, "policy."), folder)
    sources = [_source(folder / name) for name in (ABOUT, POLICY)]
    frozen = Frozen(shape, operations, k, jitter, temperature, module, policy, sources)
    seen = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, shape.channels, 8, 8)
    if not all(map(_finite, frozen.outlook(seen))):
        raise MissingError(f"{folder}: what the policy makes of an image is not finite")
    return frozen


def _fitted(images: Tensor, shape: Shape) -> Tensor:
    """`images` in the size and with the channels that the source network takes."""
    if images.shape[1] != shape.channels:
        wide = images.to(torch.float32)
        wide = wide.mean(1, keepdim=True) if shape.channels == 1 else wide.expand(-1, 3, -1, -1)
        images = wide.round().to(torch.uint8)
    if images.shape[2:] == (shape.height, shape.width):
        return images
    size = (shape.height, shape.width)
    scaled = interpolate(images.to(torch.float32), size, mode="bilinear", antialias=True, align_corners=False)
    return scaled.round().clamp(0, 255).to(torch.uint8)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with writing(path), path.open("wb") as file:
        write_mapping(file, dict(sorted(tensors.items())))


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise MissingError(f"{path}: no such file")
    try:
        found: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise MissingError(f"{path}: damaged: {str(error).partition(chr(10))[0]:.100}") from error
    if lacking := next((name for name, value in found.items() if not _finite(value)), None):
        raise MissingError(f"{path}: tensor {lacking} holds a number that is not finite")
    return found


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _loaded(
    make: Callable[[], _Module], tensors: Mapping[str, Tensor], folder: Path, own: str | None = None
) -> _Module:
    """What `make` makes, with `tensors` in it, not to learn any more.

    Memory is taken only for what the file turns out to hold: a configuration alone can ask for any amount.

    Args:
        own: beginning of the names that need not be among `tensors`.
    """
    with torch.device("meta"):
        wanted = {
            name: (value.shape, value.dtype)
            for name, value in make().state_dict().items()
            if own is None or not name.startswith(own)
        }
    if wanted != {name: (value.shape, value.dtype) for name, value in tensors.items()}:
        raise MissingError(f"{folder}: its weights are not those of its configuration")
    module = make()
    module.load_state_dict(tensors, strict=False)
    return module.eval().requires_grad_(False)


def _shape(about: object, folder: Path) -> Shape:
    """The `Shape` written as `about`, looked at before anything is built from it."""
    kinds: dict[str, Callable[[Any], Any]] = {
        "net": _text,
        "channels": lambda number: _whole(number, 1, 3),
        "height": lambda number: _whole(number, 1, _SIDE),
        "width": lambda number: _whole(number, 1, _SIDE),
        "names": lambda names: tuple(map(_text, names)),
        "mean": lambda values: tuple(map(_number, values)),
        "std": lambda values: tuple(map(_number, values)),
    }
    try:
        shape = Shape(**{name: kind(about[name]) for name, kind in kinds.items()})  # type: ignore[index]
        network(shape.net)
        if not 1 <= len(set(shape.names)) == len(shape.names) <= _CLASSES:
            raise ValueError
        if shape.channels == 2 or not len(shape.mean) == len(shape.std) == shape.channels or min(shape.std) <= 0:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise MissingError(f"{folder}: it does not say, as a run does, what its network is") from error
    except UsageError as error:
        raise MissingError(f"{folder}: {error}") from error
    return shape


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _whole(value: object, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError
    return float(value)


def _source(path: Path) -> dict[str, Any]:
    return {"name": path.name, **file_digest(path)}
