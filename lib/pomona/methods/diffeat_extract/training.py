"""An unconditional diffusion model of one's own: DDPM (Ho et al. 2020), trained to find the noise in an image.

At each step a batch of images x in [-1, 1] gets times t, uniform over 0 to T - 1, and noise eps; the U-Net e learns
from ``|e(sqrt(abar_t) x + sqrt(1 - abar_t) eps, t) - eps|^2``, the mean over all numbers (their equation 14). What is
kept of the weights is a moving average.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import Module

from pomona.errors import DataError, UnavailableError, UsageError
from pomona.io.atomic import writing
from pomona.methods.diffeat_extract.config import Config, whole_numbers
from pomona.methods.diffeat_extract.course import Course
from pomona.models.checkpoint import write_config, write_mapping
from pomona.models.unets.layout import LINEAR, WEIGHTS, write_scheduler
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Progress, Quiet
from pomona.runtime.seeds import derive

SCHEDULER = {**LINEAR, "variance_type": "fixed_small"}
"""scheduler_config.json: the noise that the model is trained with, and how diffusers is to sample from it."""

_TASK = "train"
_GROUPS = 8  # of a group norm, or the most below that divide all widths


@dataclass(frozen=True)
class Plan:
    """What will be trained.

    Attributes:
        config: the U-Net, as diffusers' `UNet2DModel` is told.
        parameters: numbers to train.
        images: how many there are to learn from.
        epochs: how often each is seen, on average.
        bytes: of the weights on disk.
    """

    config: Mapping[str, Any]
    parameters: int
    images: int
    steps: int
    epochs: float
    bytes: int


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        module: diffusers' `UNet2DModel` with the averaged weights, in evaluation mode on the CPU.
        config: what it was made with.
        losses: mean squared error of the noise, over each 100 steps; the last may be of fewer.
        seconds: how long it took, without what an interrupted run had done before.
    """

    module: Module
    config: Mapping[str, Any]
    losses: tuple[float, ...]
    seconds: float


def plan(images_shape: Sequence[int], config: Config) -> Plan:
    """The U-Net that `config` asks for on images of `images_shape`, (N, H, W, C).

    Raises:
        DataError: there are no images, or they are not square.
        UsageError: the widths ask for more halvings than the images have, or no map has a side of `attention_at`.
        UnavailableError: diffusers is not installed.
    """
    steps = config.train_model
    assert steps is not None, "run asks for a plan when --train-model is given"
    number, height, width, channels = images_shape
    if number == 0:
        raise DataError("there are no images to train on")
    if height != width:
        raise DataError(
            f"the images have {width} x {height} pixels; a model is trained on square ones",
            hint=f"--image-size {min(height, width)} crops the middle",
        )
    arguments = _arguments(height, channels, config)
    with torch.device("meta"):
        module = _unet(arguments)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    written = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    return Plan(arguments, parameters, number, steps, steps * config.train_batch / number, written)


def train(
    images: NDArray[np.uint8],
    config: Config,
    *,
    seed: int,
    runtime: Runtime,
    checkpoint: Path | None,
    progress: Progress,
) -> Trained:
    """Train a model on `images`, (N, H, W, C), for ``config.train_model`` steps.

    AdamW with weight decay 0.01, a step size that rises linearly, then falls as a cosine to nothing, gradients clipped
    to norm 1. The moving average follows faster at first, by (1 + n) / (10 + n) at step n, so that it does not remember
    the beginning. Where the number format of `runtime` is bfloat16, matrix products and convolutions are in it. With
    several processes the main one calls this, and the others have called `share`.

    Args:
        checkpoint: a file for the state of the training, from which a later call with the same arguments goes on; it is
            written every 20 seconds. None keeps none.

    Raises:
        CheckFailed: a loss or a gradient is not finite.
        MissingError: `checkpoint` is damaged.
        OutputError: `checkpoint` cannot be written.
        UsageError: `checkpoint` is of another training; float16; and as `plan`.
        DataError, UnavailableError: as `plan`.
    """
    if runtime.dtype is torch.float16:
        raise UsageError("training in float16 would lose small gradients", hint="use --dtype bfloat16 or float32")
    planned = plan(images.shape, config)
    if config.warmup_steps >= planned.steps:
        progress.warn(
            f"the warm-up of {config.warmup_steps:,} steps is not over after {planned.steps:,}: --warmup-steps"
        )
    began = time.monotonic()
    courses: list[Course] = []

    def taught(job: _Job) -> None:
        courses.append(_course(job, runtime))
        courses[0].run(checkpoint, progress)

    runtime.register(_TASK, taught)
    runtime.map(_TASK, [_Job(images, config, planned.config, seed)] * runtime.world)
    return Trained(courses[0].averaged(), planned.config, courses[0].losses(), time.monotonic() - began)


def share(runtime: Runtime) -> None:
    """In every process but the main one, before ``runtime.serve()``: take part in `train`."""
    runtime.register(_TASK, lambda job: _course(job, runtime).run(None, Quiet()))


def write(trained: Trained, folder: Path) -> None:
    """Write the model into `folder` as diffusers lays it out; the same model gives the same bytes.

    Raises:
        CheckFailed: a weight is not finite.
        OutputError: the disk is full, or the folder cannot be written.
    """
    write_config(folder, {"_class_name": "UNet2DModel", **trained.config})
    with writing(folder / WEIGHTS), (folder / WEIGHTS).open("wb") as file:
        write_mapping(file, dict(sorted(trained.module.state_dict().items())))
    write_scheduler(folder, SCHEDULER)


@dataclass(frozen=True)
class _Job:
    """What a process needs to know to train its part."""

    images: NDArray[np.uint8]
    config: Config
    arguments: Mapping[str, Any]
    seed: int


def _course(job: _Job, runtime: Runtime) -> Course:
    with torch.random.fork_rng([]):
        torch.manual_seed(derive(job.seed, "weights"))
        module = _unet(job.arguments)
    return Course(module, job.images, job.config, job.seed, runtime)


# --- the U-Net -------------------------------------------------------------------------------------------------------


def _arguments(side: int, channels: int, config: Config) -> dict[str, Any]:
    """What `UNet2DModel` is told: attention has one head, as in Ho et al.; the middle has it if its side is asked."""
    widths = whole_numbers(config.widths, "--widths")
    sides = [side >> level for level in range(len(widths))]
    if side % (1 << (len(widths) - 1)):
        raise UsageError(
            f"--widths {config.widths}: images of {side} pixels cannot be halved {len(widths) - 1} times",
            hint=f"name fewer widths, or scale with --image-size {max(1, sides[-1]) << (len(widths) - 1)}",
        )
    attended = whole_numbers(config.attention_at, "--attention-at") if config.attention_at is not None else []
    if strange := [asked for asked in attended if asked not in sides]:
        raise UsageError(
            f"--attention-at {strange[0]}: no map has that side", hint=f"the sides are {', '.join(map(str, sides))}"
        )
    down = ["AttnDownBlock2D" if each in attended else "DownBlock2D" for each in sides]
    up = ["AttnUpBlock2D" if each in attended else "UpBlock2D" for each in reversed(sides)]
    return {
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": config.residual_blocks,
        "down_block_types": down,
        "up_block_types": up,
        "add_attention": sides[-1] in attended,
        "attention_head_dim": None,
        "norm_num_groups": math.gcd(_GROUPS, *widths),
    }


def _unet(arguments: Mapping[str, Any]) -> Module:
    try:
        from diffusers.models.unets.unet_2d import UNet2DModel
    except ImportError as error:
        raise UnavailableError(
            "--train-model needs the package diffusers", hint="pip install 'pomona[vision]'"
        ) from error
    module: Module = UNet2DModel(**arguments)
    return module
