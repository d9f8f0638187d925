"""Small trainings, and the one of digits that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from pomona.methods.diffeat_extract.config import Config
from pomona.methods.diffeat_extract.training import Trained, train
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Quiet

IMAGES = np.random.default_rng(1).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)


def options(steps: int, **changed: Any) -> Config:
    """A U-Net of 6 and 12 channels, whose batches of 5 images are cut into shards of 2."""
    usual: dict[str, Any] = {"widths": "6,12", "train_batch": 5, "warmup_steps": 2, "learning_rate": 1e-2}
    return Config(train_model=steps, **{**usual, **changed})


def runtime(threads: int = 1, dtype: torch.dtype = torch.float32) -> Runtime:
    return Runtime(None, torch.device("cpu"), dtype, "a test", threads)


def trained(steps: int, *, checkpoint: Path | None = None, progress: Any = None, **changed: Any) -> Trained:
    own = {name: changed.pop(name) for name in ("images", "seed", "runtime") if name in changed}
    return train(
        own.get("images", IMAGES),
        options(steps, **changed),
        seed=own.get("seed", 0),
        runtime=own.get("runtime") or runtime(),
        checkpoint=checkpoint,
        progress=progress or Quiet(),
    )


def weights(trained: Trained) -> dict[str, torch.Tensor]:
    return dict(trained.module.state_dict())


def same(ours: Trained, theirs: Trained) -> bool:
    """Whether two trainings ended with the same bits and told the same losses."""
    first, second = weights(ours), weights(theirs)
    return ours.losses == theirs.losses and all(torch.equal(first[name], second[name]) for name in first | second)


def digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Train and test half of scikit-learn's digits, (N, 8, 8, 1), scaled from 0..16 to 0..255."""
    images = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]
    places = np.random.default_rng(0).permutation(len(images))
    return images[np.sort(places[:898])], images[np.sort(places[898:])]
