"""The model `digits` is what its recipe makes, and knows digits that it has not seen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from methods.diffeat_extract.trainings import digits, runtime
from pomona.methods.diffeat_extract import training
from pomona.methods.diffeat_extract.config import Config
from pomona.models.embedded import digits as folder
from pomona.models.unets.loading import load_unet
from pomona.runtime.progress import Quiet

MADE_ON = ("2.13.0", "AVX512", "AuthenticAMD 26 2")
"""torch, its CPU capability, and vendor, family and model of the processor: what the weights' last bits depend on."""
RECIPE = Config(train_model=2000)


@pytest.fixture(scope="module")
def unet() -> Any:
    return load_unet("digits", dtype=torch.float32, device="cpu")


def test_it_is_the_network_of_its_recipe(unet: Any) -> None:
    planned = training.plan((898, 8, 8, 1), RECIPE)
    written = json.loads((folder() / "config.json").read_bytes())
    assert written == {"_class_name": "UNet2DModel", **planned.config}
    assert sum(parameter.numel() for parameter in unet.module.parameters()) == planned.parameters
    assert f"{planned.parameters:,} parameters" in (folder() / "README.md").read_text()
    assert (unet.channels, unet.size, unet.scheduler) == (1, 8, training.SCHEDULER)


def error(module: Any, images: Any) -> float:
    """Mean squared error of the noise found in `images`, over times from 10 to 990."""
    random = np.random.default_rng(0)
    x = torch.from_numpy(images.astype(np.float64).transpose(0, 3, 1, 2) / 127.5 - 1)
    times = torch.arange(len(x)) * 980 // len(x) + 10
    left = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[times][:, None, None, None]
    eps = torch.from_numpy(random.standard_normal(x.shape))
    with torch.no_grad():
        found = module((left.sqrt() * x + (1 - left).sqrt() * eps).float(), times).sample
    return float((found - eps).square().mean())


def test_it_finds_the_noise_in_digits_it_has_not_seen_and_is_at_a_loss_with_others(unet: Any) -> None:
    taught, unseen = digits()
    mixed = np.random.default_rng(0).permuted(unseen.reshape(-1, 64), axis=1).reshape(unseen.shape)
    assert error(unet.module, taught) < 0.08 and error(unet.module, unseen) < 0.08
    assert error(unet.module, mixed) > 0.2


def made_here() -> tuple[str, str, str]:
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = [
        re.search(rf"^{name}\s*:\s*(\S+)", described, re.MULTILINE) for name in ("vendor_id", "cpu family", "model")
    ]
    processor = " ".join(match[1] for match in found if match)
    return torch.__version__.split("+")[0], torch.backends.cpu.get_cpu_capability(), processor


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_its_recipe_makes_the_same_bytes_again(tmp_path: Path) -> None:
    taught, _ = digits()
    made = training.train(taught, RECIPE, seed=0, runtime=runtime(2), checkpoint=None, progress=Quiet())
    assert made.losses[-1] == pytest.approx(0.0767, rel=0.02)
    training.write(made, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {path.name for path in folder().iterdir()} - {"README.md"}
    if made_here() == MADE_ON:
        differing = [name for name, content in files.items() if content != (folder() / name).read_bytes()]
        assert not differing
    else:
        print(f"made on {MADE_ON}, tested on {made_here()}: the losses were compared, the bytes were not")
