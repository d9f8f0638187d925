"""Every head learns real digits from a network of random weights, by the released recipe in steps of 8 images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pomona.methods.diffeat_extract.heads.diffeed import DifFeed, feedback
from pomona.methods.diffeat_extract.heads.difformer import DifFormer, blocks_to_read
from pomona.methods.diffeat_extract.heads.learning import RATES, learn, predict
from pomona.methods.diffeat_extract.heads.modules import Attention, linear, mlp
from pomona.models.unets.blocks import blocks
from pomona.models.unets.truncated import Truncated
from pomona.runtime.progress import Quiet
from small_unet import small_unet

pytestmark = pytest.mark.slow

TIMES = (10, 50, 100)
FLOORS = {"linear": 0.80, "mlp": 0.75, "attention": 0.80, "difformer": 0.73, "diffeed": 0.60}  # chance is 0.1


@pytest.mark.parametrize("name", FLOORS)
def test_a_head_learns_digits(name: str) -> None:
    unet, images = small_unet(widths=(16, 32)), load_digits()
    table = blocks(unet, 8)
    clean = torch.from_numpy(images.images / 8 - 1).float()[:, None]
    eps = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    alpha_bars = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))).float()
    order = np.random.default_rng(0).permutation(len(clean))
    rows, tests = order[:300], order[300:]

    def noisy(time: int) -> Tensor:
        return alpha_bars[time].sqrt() * clean + (1 - alpha_bars[time]).sqrt() * eps

    def maps(time: int, numbers: list[int]) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = Truncated(unet, numbers)(noisy(time), torch.full((len(clean),), time))
        return found

    plan, several = feedback(table), blocks_to_read(table)
    shapes = {block.number: (block.channels, block.side) for block in table}
    own = shapes[plan.head]
    dims = own[0] * own[1] ** 2
    made: dict[str, tuple[Callable[[], nn.Module], Any]] = {
        "linear": (lambda: linear(dims, 10, seed=0), lambda: maps(50, [plan.head])),
        "mlp": (lambda: mlp(dims, (64,), 10, seed=0), lambda: maps(50, [plan.head])),
        "attention": (lambda: Attention(*own, 10, seed=0), lambda: maps(50, [plan.head])),
        "difformer": (
            lambda: DifFormer([shapes[number] for number in several], len(TIMES), 10, seed=0),
            lambda: tuple(one for time in TIMES for one in maps(time, several)),
        ),
        "diffeed": (lambda: DifFeed(unet, table, plan, 10, time=50, seed=0), lambda: (noisy(50),)),
    }
    head, given = (make() for make in made[name])

    def inputs(chosen: NDArray[np.int64]) -> tuple[Tensor, ...]:
        return tuple(tensor[torch.from_numpy(chosen)] for tensor in given)

    losses = learn(head, inputs, images.target, rows, epochs=28, batch=8, rate=RATES[name], seed=0, progress=Quiet())
    accuracy = float((predict(head, inputs, tests, batch=128) == images.target[tests]).mean())
    print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}, accuracy {accuracy:.3f}")
    assert losses[-1] < losses[0]
    assert accuracy >= FLOORS[name]
