"""One training: a network, and with it a policy, from the first step to the test.

In each step a batch of images goes through the standard crop and mirroring; each image is then augmented with the
probability that the curriculum gives, as the policy says to which the network's own features of the image are told;
and every few steps the policy moves so that the network's next step serves the validation images better.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.errors import UsageError
from pomona.methods.madaug_train.course import Course
from pomona.methods.madaug_train.data import open_prepared
from pomona.methods.madaug_train.recipe import Recipe
from pomona.methods.madaug_train.saved import read_policy
from pomona.methods.madaug_train.splits import parts
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Progress, Quiet

_TASK = "madaug"


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes:
        contender: "madaug" learns a policy, "transfer" uses one that is given, "random" has one that knows nothing,
            "uniform" draws all strengths alike, "none" augments nothing, "train+val" is as "random" and learns from the
            images to learn a policy on as well.
        data: folder of the prepared images.
        dtype, device: as `Runtime.open` takes them.
        policy: directory of the policy to use; of "transfer" alone.
    """

    contender: str
    seed: int
    recipe: Recipe
    data: Path
    dtype: str
    device: str
    policy: Path | None = None


@dataclass(frozen=True)
class Trained:
    """What a training has come to; tensors are on the CPU.

    Attributes:
        network: tensors of the network.
        policy: those of the policy that reads its features; None unless one was learned.
        predictions: the class of each test image by the network, (tests,).
        epochs: a row for each, which metrics.jsonl has too.
        history: (epochs, classes, operations, 6), the last axis as `table.HISTORY`; empty without a policy.
        strips: images as they are and under the policy, (images, 1 + draws, C, H, W), for each of `record.MOMENTS`;
            empty without a policy.
        shown: places of the classes of the images in `strips`.
        mean, std: of the channels, by which the images were normalised.
        parts: how many images were in each, and how many in none.
        updates: steps of the policy.
        seconds: how long it took, without what an interrupted run had done before.
    """

    network: dict[str, Tensor]
    policy: dict[str, Tensor] | None
    predictions: NDArray[np.int64]
    epochs: list[dict[str, Any]]
    history: NDArray[np.float32]
    strips: dict[str, NDArray[np.uint8]]
    shown: list[int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    parts: dict[str, int]
    updates: int
    seconds: float


def train(job: Job, *, runtime: Runtime, checkpoint: Path | None, progress: Progress) -> Trained:
    """Train what `job` says, with all processes of a launch where there are several; the others have called `share`.

    SGD with momentum 0.9, gradients clipped to norm ``--clip``, a step size as `Schedule.rate` has it. Where the number
    format of `runtime` is bfloat16, matrix products and convolutions of the network's own steps are in it; those of the
    policy never are. Test images are looked at once, at the end.

    Args:
        checkpoint: a file for the state of the training, from which a later call with the same arguments goes on; it is
            written every 20 seconds. None keeps none.

    Raises:
        CheckFailed: a loss or a gradient is not finite.
        DataError: the images cannot be parted.
        MissingError: `checkpoint`, the prepared images or the policy are damaged.
        OutputError: `checkpoint` cannot be written.
        UsageError: `checkpoint` is of another training; float16.
    """
    if runtime.dtype is torch.float16:
        raise UsageError("training in float16 would lose small gradients", hint="use --dtype bfloat16 or float32")
    began = time.monotonic()
    found: list[Trained] = []

    def trained(job: Job) -> None:
        course = _course(job, runtime)
        course.run(checkpoint, progress)
        found.append(_outcome(course, began))

    runtime.register(_TASK, trained)
    runtime.map(_TASK, [job] * runtime.world)
    return found[0]


def share(runtime: Runtime) -> None:
    """In every process but the main one, before ``runtime.serve()``: take part in `train`."""

    def shared(job: Job) -> None:
        course = _course(job, runtime)
        course.run(None, Quiet())
        course.predictions()

    runtime.register(_TASK, shared)


def _course(job: Job, runtime: Runtime) -> Course:
    prepared = open_prepared(job.data)
    given = read_policy(job.policy).to(runtime.device) if job.policy is not None else None
    divided = parts(prepared, prepared.options, seed=job.seed)
    return Course(job.contender, job.seed, job.recipe, prepared, divided, given, runtime)


def _outcome(course: Course, began: float) -> Trained:
    predictions = course.predictions()
    divided = course.parts
    return Trained(
        network=course.network(),
        policy=course.policy(),
        predictions=predictions,
        epochs=course.state.rows,
        history=course.history(),
        strips=course.strips(),
        shown=course.shown(),
        mean=divided.mean,
        std=divided.std,
        parts={
            "train": len(divided.train),
            "val": len(divided.val),
            "test": len(divided.test),
            "unused": divided.unused,
        },
        updates=course.state.updates,
        seconds=time.monotonic() - began,
    )
