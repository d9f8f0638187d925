"""U-Nets small enough to run in a test, written as diffusers does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "trained_betas": None,
    "variance_type": "fixed_small",
}


def config(*, channels: int = 1, size: int = 8, widths: Sequence[int] = (16, 32), **changed: Any) -> dict[str, Any]:
    """Of a `UNet2DModel` without attention; `changed` are other fields of it."""
    return {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": list(widths),
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D"] * len(widths),
        "up_block_types": ["UpBlock2D"] * len(widths),
        "norm_num_groups": 8,
        "add_attention": False,
        **changed,
    }


def small_unet(*, seed: int = 0, conditional: bool = False, **sizes: Any) -> Any:
    """A `UNet2DModel`, or a `UNet2DConditionModel`, of random weights; `sizes` as those of `config`."""
    import torch

    if conditional:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel as kind
    else:
        from diffusers.models.unets.unet_2d import UNet2DModel as kind

    fields = config(**sizes)
    if conditional:
        fields.pop("add_attention")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = kind(**fields)
        for name, parameter in module.named_parameters():  # as in a trained model, where no bias is zero, no scale one
            if "norm" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return module.eval().requires_grad_(False)


def save_small_unet(
    folder: Path,
    *,
    channels: int = 1,
    size: int = 8,
    widths: Sequence[int] = (16, 32),
    seed: int = 0,
    scheduler: Mapping[str, Any] | None = SCHEDULER,
    **changed: Any,
) -> Path:
    """Write the model, and its scheduler's configuration if any, to `folder` and return it."""
    small_unet(channels=channels, size=size, widths=widths, seed=seed, **changed).save_pretrained(folder)
    if scheduler is not None:
        (folder / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    return folder
