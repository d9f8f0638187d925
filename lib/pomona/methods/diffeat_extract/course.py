"""The steps of a training: what each sees, its gradient, and what becomes of the weights.

A step's random numbers depend on the seed and the step alone, and its batch is cut into shards that are each computed
by one thread and summed in their order. So neither threads nor interruptions show in the weights, on a CPU not in a
single bit; several processes share the shards, and differ from one in the order of sums alone.

All weights are one vector, of which the parameters of the model are views. So the optimiser, the moving average, what
processes exchange and what is kept on the disk are a few operations each, however many layers there are.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module, Parameter

from pomona.errors import CheckFailed
from pomona.methods.diffeat_extract.config import Config
from pomona.methods.diffeat_extract.noising import noised, schedule
from pomona.methods.diffeat_extract.training_state import WINDOW, State
from pomona.models.vectors import parts, weights_of
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Progress
from pomona.runtime.seeds import derive

_SHARD = 32  # images that a thread computes at a time: more, and a batch of 64 would keep one core busy alone
_DECAY = 0.01  # of the weights, torch's own default for AdamW
_CLIP = 1.0
_EVERY = 20.0  # seconds from one written state to the next


class Course:
    """The steps of one training.

    Args:
        module: a U-Net of diffusers, with the weights to begin from.
        images: what to learn from, (N, H, W, C).
    """

    def __init__(self, module: Module, images: NDArray[np.uint8], config: Config, seed: int, runtime: Runtime) -> None:
        assert config.train_model is not None
        self._steps = config.train_model
        self._module = module.to(runtime.device).train()
        self._images, self._config, self._seed, self._runtime = images, config, seed, runtime
        self._parameters = list(module.parameters())
        self._state = State.start(weights_of(self._module))
        self._alpha_bars = schedule("linear", None).alpha_bars
        self._kept: int | None = None

    def run(self, checkpoint: Path | None, progress: Progress) -> None:
        """Take the steps that are still to be taken, and keep the state in `checkpoint` meanwhile.

        Raises:
            CheckFailed: a loss or a gradient is not finite.
            MissingError, UsageError, OutputError: as `State` does on `checkpoint`.
        """
        state, batch = self._state, self._config.train_batch
        fingerprint = self._fingerprint() if checkpoint is not None else ""
        if checkpoint is not None and checkpoint.exists():
            state.read(checkpoint, fingerprint)
            self._kept = state.step
        self._share(state)
        weights = Parameter(state.weights)
        optimiser = self._adamw(weights)
        places = _order(len(self._images), self._seed, state.step * batch)
        progress.start("training", self._steps)
        progress.advance(state.step)
        written = time.monotonic()
        with ThreadPoolExecutor(self._runtime.threads, "train", torch.set_num_threads, (1,)) as pool:
            while state.step < self._steps:
                loss, gradient = self._gradient(np.fromiter(islice(places, batch), np.int64, batch), pool)
                norm = float(gradient.norm())
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise self._broken_off("gradient" if math.isfinite(loss) else "loss", checkpoint)
                weights.grad = gradient.mul_(min(1.0, _CLIP / (norm + 1e-6)))
                optimiser.param_groups[0]["lr"] = self._rate(state.step)
                optimiser.step()
                state.average.lerp_(state.weights, 1 - min(self._config.average, (1 + state.step) / (10 + state.step)))
                state.add(loss)
                if state.step % WINDOW == 0:
                    progress.note(f"step {state.step:,}: loss {state.losses[-1]:.4f}")
                if checkpoint is not None and time.monotonic() - written >= _EVERY:
                    state.write(checkpoint, fingerprint)
                    self._kept, written = state.step, time.monotonic()
                progress.advance()

    def losses(self) -> tuple[float, ...]:
        """Mean losses of `WINDOW` steps each, the last of those that are left."""
        left = self._state.open
        return (*self._state.losses, *([math.fsum(left) / len(left)] if left else []))

    def averaged(self) -> Module:
        """The model, with the averaged weights in it."""
        for parameter, part in zip(self._parameters, parts(self._state.average, self._parameters), strict=True):
            parameter.data = part.cpu().clone()
        return self._module.cpu().eval().requires_grad_(False)

    def _gradient(self, places: NDArray[np.int64], pool: ThreadPoolExecutor) -> tuple[float, Tensor]:
        """Loss and gradient, (P,), of the next step, which sees the images at `places`."""
        x = torch.from_numpy(self._images[places]).movedim(-1, 1).float() / 127.5 - 1
        times = torch.from_numpy(self._random("times").integers(len(self._alpha_bars), size=len(x)))
        eps = torch.from_numpy(self._random("noise").standard_normal(x.shape, dtype=np.float32))
        noisy = noised(x, self._alpha_bars[times], eps)
        device, world = self._runtime.device, self._runtime.world
        size = _SHARD if device.type == "cpu" else -(-len(x) // world)
        shards = list(zip(*(torch.split(part.to(device), size) for part in (noisy, times, eps)), strict=True))
        total = torch.zeros(len(self._state.weights) + 1, device=device)
        for part in pool.map(lambda shard: self._squared(*shard), shards[self._runtime.rank :: world]):
            total += part
        if world > 1:
            total = self._runtime.accelerator.reduce(total, "sum")
        total /= eps.numel()
        return float(total[-1]), total[:-1]

    def _squared(self, noisy: Tensor, times: Tensor, eps: Tensor) -> Tensor:
        """The gradient of the summed squared error of a shard, and behind it that sum."""
        narrow = self._runtime.dtype is torch.bfloat16
        # Each weight is used once, and a cache of narrowed ones would be shared among threads.
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=narrow, cache_enabled=False):
            (predicted,) = self._module(noisy, times, return_dict=False)
        error = (predicted.float() - eps).square().sum()
        gradients = torch.autograd.grad(error, self._parameters)
        return torch.cat([*(gradient.flatten() for gradient in gradients), error.detach()[None]])

    def _adamw(self, weights: Parameter) -> torch.optim.AdamW:
        """The optimiser of the one vector of weights, with the moments of the state."""
        optimiser = torch.optim.AdamW([weights], lr=self._config.learning_rate, weight_decay=_DECAY, fused=True)
        step = torch.tensor(float(self._state.step), device=weights.device)
        moments = {"exp_avg": self._state.first, "exp_avg_sq": self._state.second}
        optimiser.state[weights] = {"step": step, **moments}
        return optimiser

    def _rate(self, step: int) -> float:
        """Step size: linear over the warm-up, then a cosine to 0 at the end."""
        warmup, steps = self._config.warmup_steps, self._steps
        if step < warmup:
            return self._config.learning_rate * (step + 1) / warmup
        return self._config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    def _random(self, name: str) -> np.random.Generator:
        """The random numbers `name` of the next step; Philox, whose numbers are the same on every processor."""
        return np.random.Generator(np.random.Philox(derive(self._seed, f"{name}/{self._state.step}")))

    def _share(self, state: State) -> None:
        """Give every process the state that the main one has."""
        if self._runtime.world == 1:
            return
        from accelerate.utils import broadcast, broadcast_object_list

        told = broadcast_object_list([state.step, state.losses, state.open])
        state.step, state.losses, state.open = told
        for tensor in state.tensors().values():
            tensor.copy_(broadcast(tensor))

    def _fingerprint(self) -> str:
        """What tells this training from others: images, model, options, seed, number format."""
        config, images = self._config, np.ascontiguousarray(self._images)
        decisive = [
            hashlib.sha256(images.reshape(-1).data).hexdigest(),
            *(images.shape, config.widths, config.residual_blocks, config.attention_at),
            *(self._steps, config.train_batch, config.learning_rate, config.warmup_steps, config.average),
            *(self._seed, str(self._runtime.dtype)),
        ]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def _broken_off(self, what: str, checkpoint: Path | None) -> CheckFailed:
        kept = f"{checkpoint} keeps the state after step {self._kept:,}" if self._kept else "nothing is kept"
        return CheckFailed(
            f"the {what} was not finite at step {self._state.step + 1:,}; {kept}",
            hint=f"a smaller --learning-rate than {self._config.learning_rate:g} may help",
        )


def _order(images: int, seed: int, start: int) -> Iterator[int]:
    """Places of images without end, every image once in random order, then all over again; from the `start`-th on."""
    for epoch in count(start // images):
        places = np.random.Generator(np.random.Philox(derive(seed, f"order/{epoch}"))).permutation(images)
        yield from places[max(0, start - epoch * images) :].tolist()
