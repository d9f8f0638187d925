"""Small trainings on a few of the digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pomona.methods.madaug_train.config import Config
from pomona.methods.madaug_train.data import Inputs
from pomona.methods.madaug_train.recipe import Recipe, recipe
from pomona.methods.madaug_train.training import Job, Trained, train
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Quiet
from pomona.runtime.settings import Settings

EPOCHS = 3
BATCHES = 3
"""Of 8, 8 and 6 images."""

STEPS = EPOCHS * BATCHES


LAUNCHED: dict[str, Any] = {"train_batch": 10, "crop": 1, "flip": True, "cutout": 2}
"""What differs where several processes train."""


def prepared(folder: Path, images: int = 22, tests: int = 1755) -> Path:
    """`folder`, with the digits in it, of which so many are learned from; the policy is learned on 20."""
    folder.mkdir(parents=True, exist_ok=True)
    Inputs(Config(train_images=images, val_images=20), Settings(), ("builtin:digits",)).prepare(folder, Quiet())
    return folder


def settled(**changed: Any) -> Recipe:
    """A recipe of 9 steps, in which everything happens that can: each second one moves the policy."""
    usual = {
        "epochs": EPOCHS,
        "train_batch": 8,
        "lr": 0.1,
        "warmup_epochs": 1,
        "label_smoothing": 0.1,
        "weight_decay": 1e-2,
        "clip": 0.5,
        "ops": "TranslateX,Invert,Contrast,Cutout",
        "tau": 1.0,
        "curriculum_floor": 0.2,
        "policy_every": 2,
        "policy_decay": 1e-2,
        "inner_batch": 3,
        "val_batch": 5,
    }
    return replace(recipe(Config(), "digits"), **{**usual, **changed})


def runtime(dtype: torch.dtype = torch.float32) -> Runtime:
    return Runtime(None, torch.device("cpu"), dtype, "a test", 1)


def trained(
    data: Path,
    contender: str = "madaug",
    *,
    seed: int = 0,
    policy: Path | None = None,
    checkpoint: Path | None = None,
    progress: Any = None,
    on: Runtime | None = None,
    **changed: Any,
) -> Trained:
    job = Job(contender, seed, settled(**changed), data, "float32", "cpu", policy)
    return train(job, runtime=on or runtime(), checkpoint=checkpoint, progress=progress or Quiet())


def same(ours: Trained, theirs: Trained) -> bool:
    """Whether two trainings came to the same bits."""
    tensors = [(ours.network, theirs.network), (ours.policy or {}, theirs.policy or {})]
    arrays = [(ours.strips, theirs.strips), ({"h": ours.history}, {"h": theirs.history})]
    plain = [(one.epochs, one.mean, one.std, one.parts, one.updates) for one in (ours, theirs)]
    return (
        plain[0] == plain[1]
        and np.array_equal(ours.predictions, theirs.predictions)
        and all(list(one) == list(other) for one, other in [*tensors, *arrays])
        and all(torch.equal(one[name], other[name]) for one, other in tensors for name in one)
        and all(np.array_equal(one[name], other[name]) for one, other in arrays for name in one)
    )
