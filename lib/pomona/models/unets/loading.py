"""U-Nets read from disk: a directory that diffusers has written, alone or within a pipeline; the embedded one.

Weights are read from safetensors alone, nothing is fetched, and no code of a model's repository is run.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pomona.errors import DataError, MissingError, PomonaError, UnavailableError
from pomona.io.manifest import file_digest
from pomona.models.checkpoint import json_object
from pomona.models.unets.layout import SCHEDULER, WEIGHTS
from pomona.models.unets.stages import stages

EMBEDDED = "digits"
"""Trained on the digits of scikit-learn; it comes with Pomona."""
INSTALL = "pip install 'pomona[vision]'"

_CONFIG = "config.json"
_WEIGHTS = WEIGHTS.removesuffix(".safetensors")
_CLASSES = {  # and the modules that hold them: diffusers as a whole takes seconds to import
    "UNet2DModel": "diffusers.models.unets.unet_2d",
    "UNet2DConditionModel": "diffusers.models.unets.unet_2d_condition",
}


@dataclass(frozen=True)
class UNet:
    """A U-Net on its device, in evaluation mode, its parameters without gradients.

    Attributes:
        name: as it was asked for.
        module: diffusers' `UNet2DModel` or `UNet2DConditionModel`.
        config: config.json as read.
        channels: of the images that it takes.
        size: side of the images that it was trained on; None where its configuration has none, or no square.
        scheduler: scheduler_config.json as read; None if there is none.
        sources: name, size and SHA-256 of each file that was read.
    """

    name: str
    module: Any
    config: Mapping[str, Any]
    channels: int
    size: int | None
    scheduler: Mapping[str, Any] | None
    sources: list[dict[str, Any]]


def load_unet(name: str, *, dtype: torch.dtype, device: torch.device | str) -> UNet:
    """Load the U-Net called `name`.

    Args:
        name: digits for the embedded one; a directory with config.json and weights in safetensors; that of a pipeline,
            which has them in unet/; else the id of a repository that the hub's cache holds.

    Raises:
        MissingError: it is not there, its files are damaged or disagree, or its weights are a pickle.
        DataError: it is no U-Net of these classes, or its blocks cannot be told apart.
        UnavailableError: diffusers is not installed.
    """
    folder = _folder(name)
    config = json_object(folder / _CONFIG, "is this the directory of a model, or of a pipeline with unet/?")
    kind = _class(name, config)
    variant, files = _weights(folder)
    _check_plausible(name, config, files)
    scheduler = next((path for path in _schedulers(folder) if path.is_file()), None)
    told = None if scheduler is None else json_object(scheduler)
    with _explained(name):
        module, report = kind.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    for what in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, report[f"{what}_keys"])):
            raise MissingError(
                f"model {name}: {_CONFIG} and the weights disagree: {len(keys)} tensors are {what}, among them "
                f"{keys[0]}",
                hint="are the files of one download?",
            )
    stages(module)
    read = [folder / _CONFIG, *files, *([scheduler] if scheduler else [])]
    return UNet(
        name=name,
        module=module.to(device).eval().requires_grad_(False),
        config=config,
        channels=int(module.config.in_channels),
        size=_side(module.config.sample_size),
        scheduler=told,
        sources=[{"name": path.name, **file_digest(path)} for path in read],
    )


def random_weights(unet: UNet, seed: int) -> UNet:
    """The same network before any training: torch's default initialisation, drawn on the processor from `seed`."""
    before = next(unet.module.parameters())
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        module = type(unet.module).from_config(unet.module.config).to(before.device, before.dtype)
    module = module.eval().requires_grad_(False)
    return replace(unet, module=module, sources=[])


# --- files -----------------------------------------------------------------------------------------------------------


def _folder(name: str) -> Path:
    """Where config.json of the U-Net is, or should be."""
    if name == EMBEDDED:
        folder = Path(__file__).parent / EMBEDDED
        if not folder.is_dir():
            raise MissingError(f"the embedded model {name} is not in this installation", hint="install Pomona again")
        return folder
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise MissingError(
                f"model {name}: no such directory", hint=f"give {EMBEDDED}, a directory, or a hub id that is cached"
            )
        folder = _cached(name)
    nested = folder / "unet"
    return nested if not (folder / _CONFIG).exists() and nested.is_dir() else folder


def _cached(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # the hub raises what it likes of an id that is none, or not cached
        raise MissingError(
            f"model {name}: no such directory, and the hub's cache has no such repository",
            hint=f"nothing is fetched; fetch it first: hf download {name}",
        ) from error


def _class(name: str, config: Mapping[str, Any]) -> Any:
    named = config.get("_class_name")
    if not isinstance(named, str) or named not in _CLASSES:
        raise DataError(f"model {name}: {_CONFIG} is of {named!r:.60}", hint=f"known: {', '.join(_CLASSES)}")
    if config.get("quantization_config") is not None:
        raise DataError(f"model {name}: its weights are quantized", hint="give the model that they were made from")
    try:
        return getattr(importlib.import_module(_CLASSES[named]), named)
    except ImportError as error:
        raise UnavailableError("diffusion models need the package diffusers", hint=INSTALL) from error


def _weights(folder: Path) -> tuple[str | None, list[Path]]:
    """The variant to load, None where the plain files are there, and the files of weights."""
    for variant in (None, "fp32", "fp16"):
        ending = f".{variant}" if variant else ""
        alone = folder / f"{_WEIGHTS}{ending}.safetensors"
        index = folder / f"{_WEIGHTS}.safetensors.index{ending}.json"
        if index.is_file():  # diffusers prefers it, too
            return variant, [index, *_shards(index)]
        if alone.is_file():
            return variant, [alone]
    if pickles := sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern)
    ):
        raise MissingError(
            f"model {folder}: its weights are a pickle ({pickles[0]}), which can run code when loaded",
            hint="convert it to safetensors on a machine where you trust it: unet.save_pretrained(FOLDER)",
        )
    raise MissingError(f"model {folder}: {_WEIGHTS}.safetensors is missing")


def _shards(index: Path) -> list[Path]:
    placed = json_object(index).get("weight_map")
    if not isinstance(placed, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in placed.values()
    ):
        raise MissingError(f"model {index.parent}: {index.name} is damaged")
    files = [index.parent / name for name in sorted(set(placed.values()))]
    if lacking := [file.name for file in files if not file.is_file()]:
        raise MissingError(
            f"model {index.parent}: {len(lacking)} of {len(files)} shards missing: {', '.join(lacking[:5])}"
        )
    return files


def _check_plausible(name: str, config: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Refuse damaged files of weights, and a configuration of more layers than they can fill, which would take ages."""
    from safetensors import SafetensorError, safe_open

    tensors = 0
    for file in files:
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, "numpy") as opened:
                tensors += len(opened.keys())
        except (SafetensorError, OSError) as error:
            raise MissingError(
                f"{file}: not a whole safetensors file: {_first_line(error)}", hint="was the download cut short?"
            ) from error
    for key in ("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block"):
        if any(number > tensors for number in _numbers(config.get(key))):
            raise MissingError(
                f"model {name}: {_CONFIG} and the weights disagree: {key} is {config[key]!r:.60}, and the weights have "
                f"{tensors} tensors in all",
                hint="are the files of one download?",
            )


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in nested lists."""
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int | float):
        yield value


def _schedulers(folder: Path) -> Iterator[Path]:
    yield folder / SCHEDULER
    yield folder.parent / "scheduler" / SCHEDULER


def _side(sample_size: Any) -> int | None:
    sides = sample_size if isinstance(sample_size, list | tuple) else [sample_size]
    square = len(sides) > 0 and all(isinstance(side, int) and side == sides[0] for side in sides)
    return int(sides[0]) if square and sides[0] > 0 else None


# --- what diffusers says ---------------------------------------------------------------------------------------------


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What diffusers raises while it loads, as one line."""
    try:
        with _quiet():
            yield
    except PomonaError:
        raise
    except Exception as error:
        raise MissingError(
            f"model {name}: cannot be loaded: {_first_line(error)}", hint="are its files complete, and of one download?"
        ) from error


def _first_line(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.partition(". If you want")[0]  # advice on diffusers' own options


@contextmanager
def _quiet() -> Iterator[None]:
    """Its log says again what is said here, and its bars would run through ours."""
    from diffusers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
