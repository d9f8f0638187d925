"""How a directory of diffusers is laid out, for those that write one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pomona.io.atomic import writing

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler_config.json"
LINEAR: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
"""The schedule of Ho et al. 2020; `variance_type` is for each model to say."""


def write_scheduler(folder: Path, scheduler: Mapping[str, Any]) -> None:
    """Write scheduler_config.json into `folder`.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    with writing(folder / SCHEDULER):
        (folder / SCHEDULER).write_text(json.dumps(scheduler, indent=2, sort_keys=True) + "\n", "utf-8")
