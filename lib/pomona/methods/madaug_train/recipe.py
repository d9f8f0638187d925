"""What a training is told: every number that the options leave to a preset, settled."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from pomona.errors import UsageError
from pomona.methods.madaug_train.config import Config

# As in the released code's script for reduced CIFAR-10.
_CODE: dict[str, Any] = {
    "net": "wrn-28-10",
    "epochs": 240,
    "train_batch": 128,
    "lr": 0.1,
    "min_lr": 1e-4,
    "weight_decay": 5e-4,
    "warmup_epochs": 5,
    "warmup_factor": 2.0,
    "label_smoothing": 0.1,
    "crop": 4,
    "flip": True,
    "cutout": 16,
    "tau": 40.0,
    "curriculum_floor": 0.01,
    "temperature": 3.0,
    "policy_lr": 1e-3,
    "policy_decay": 1e-3,
    "policy_every": 3,
    "inner_batch": 128,
    "val_batch": 16,
    "relaxation": "image",
    "inner_bn": "eval",
}
_PHOTOS = _CODE | {
    "net": "wrn-40-2",
    "epochs": 200,
    "min_lr": 0.0,
    "warmup_factor": 1.0,
    "label_smoothing": 0.0,
    "curriculum_floor": 0.0,
    "temperature": 1.0,
    "policy_lr": 5e-3,
    "policy_decay": 0.0,
    "inner_batch": 16,
    "val_batch": 64,
    "relaxation": "loss",
    "inner_bn": "batch",
}
_PRESETS: dict[str, dict[str, Any]] = {
    "code": _CODE,
    "paper": _CODE | {"label_smoothing": 0.0, "curriculum_floor": 0.0},
    "photos": _PHOTOS,
    "digits": _PHOTOS
    | {
        "net": "cnn-small",
        "epochs": 80,
        "train_batch": 50,
        "lr": 0.05,
        "warmup_epochs": 0,
        "crop": 0,
        "flip": False,
        "cutout": 0,
        "tau": 20.0,
        "policy_every": 1,
        "val_batch": 50,
    },
}


@dataclass(frozen=True)
class Recipe:
    """The options of `Config` of the same names, none left open; `train_batch` is ``--batch-size``."""

    net: str
    epochs: int
    train_batch: int
    lr: float
    min_lr: float
    weight_decay: float
    warmup_epochs: int
    warmup_factor: float
    label_smoothing: float
    crop: int
    flip: bool
    cutout: int
    clip: float
    select: str
    ops: str
    k: int
    tau: float
    curriculum_floor: float
    temperature: float
    jitter: float
    policy_hidden: int
    policy_lr: float
    policy_decay: float
    policy_every: int
    policy_start: int
    inner_batch: int
    val_batch: int
    relaxation: str
    inner_bn: str
    hypergradient: str
    magnitude_grad: str
    entropy_warn: float
    backend: str


def recipe(config: Config, preset: str, batch_size: int | None = None) -> Recipe:
    """What `config` asks for, with `preset` for what it leaves open.

    Args:
        batch_size: ``--batch-size``: images in a training step.

    Raises:
        UsageError: the warm-up is as long as the training.
    """
    given: dict[str, Any] = {field.name: getattr(config, field.name, batch_size) for field in fields(Recipe)}
    found = Recipe(**{name: _PRESETS[preset][name] if value is None else value for name, value in given.items()})
    if found.warmup_epochs >= found.epochs:
        raise UsageError(
            f"a warm-up of {found.warmup_epochs} epochs leaves nothing of {found.epochs}",
            hint="give fewer --warmup-epochs",
        )
    return found
