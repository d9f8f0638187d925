"""Noise: how much at which time, and which noise an image gets.

The noisy image at time t is ``x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps``, where abar_t is the product of
``1 - beta_s`` over s = 0 to t (Ho et al. 2020, equation 4). Times are the model's own, 0 to T - 1, never rescaled.
Betas and their products are float64, the noise is float32, whatever the model computes in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.errors import DataError
from pomona.runtime.seeds import derive

_TIMES = 1000
_FIRST, _LAST = 1e-4, 0.02
_MOST_TIMES = 1_000_000
_HINT = "--schedule linear or --schedule cosine instead, if one of these is what the model was trained with"


@dataclass(frozen=True)
class Schedule:
    """How much of the image is left at each time.

    Attributes:
        name: what it is and where it comes from, for people.
        alpha_bars: abar_t for t = 0 to T - 1, shape (T,), float64, never rising.
    """

    name: str
    alpha_bars: Tensor


def schedule(option: str, scheduler: Mapping[str, Any] | None) -> Schedule:
    """The noise schedule that `option` asks for.

    Args:
        option: "linear" (Ho et al. 2020, section 4: beta from 1e-4 to 0.02) or "cosine" (Nichol & Dhariwal 2021,
            equation 17), both over 1,000 times; "model" is what the model says, or linear where it says nothing.
        scheduler: scheduler_config.json of the model, as diffusers writes it, or None. Its betas decide and nothing
            else: what the model predicts (noise, velocity, image) and how it is sampled do not matter here.

    Raises:
        DataError: the model's schedule is of no known kind, or its numbers make none.
    """
    if option == "model" and scheduler is not None:
        return _of_model(scheduler)
    if option == "cosine":
        return Schedule(f"cosine over {_TIMES:,} times", _alpha_bars(_cosine(_TIMES)))
    said = ", as the model names none" if option == "model" else ""
    return Schedule(
        f"linear from {_FIRST:g} to {_LAST:g} over {_TIMES:,} times{said}",
        _alpha_bars(np.linspace(_FIRST, _LAST, _TIMES)),
    )


def noise(seed: int, id: str, timestep: int, view: int, draw: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of `shape`, float32 on the CPU, that depends on the arguments and on nothing else.

    So an image gets the same noise in every batch, order and process. The generator is Philox (Salmon et al. 2011),
    made to be keyed: each key is a stream of its own, there is no state to warm up, and NumPy promises its bits for
    good. The ziggurat on top of it calls no vectorised logarithm or cosine, which round differently from processor to
    processor. torch's generator on the CPU keeps only 32 bits of its seed, which is too few for a million images.
    """
    key = derive(seed, f"noise/{timestep}/{view}/{draw}/{id!a}")
    drawn = np.random.Generator(np.random.Philox(key=key)).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(drawn)


def noised(x: Tensor, alpha_bar: Tensor | float, eps: Tensor) -> Tensor:
    """``sqrt(abar) x + sqrt(1 - abar) eps`` in the number format and on the device of `x`.

    Args:
        x: images in [-1, 1], (B, C, H, W).
        alpha_bar: one for all, or one for each image, (B,); its roots are taken in float64.
        eps: noise of the shape of `x`.
    """
    left = torch.as_tensor(alpha_bar, dtype=torch.float64)
    left = left.reshape(left.shape + (1,) * (x.ndim - left.ndim)) if left.ndim else left
    return left.sqrt().to(x) * x + (1 - left).sqrt().to(x) * eps.to(x)


def _of_model(scheduler: Mapping[str, Any]) -> Schedule:
    kind, betas = _betas(scheduler)
    alpha_bars = _alpha_bars(betas)
    if scheduler.get("rescale_betas_zero_snr"):
        kind += ", rescaled to end in noise alone"
        alpha_bars = _without_end(alpha_bars)
    return Schedule(f"{kind} over {len(alpha_bars):,} times, of the model", alpha_bars)


def _betas(scheduler: Mapping[str, Any]) -> tuple[str, NDArray[np.float64]]:
    """What the betas of the model are called, and the betas."""
    if scheduler.get("trained_betas") is not None:
        return "trained betas", _trained(scheduler["trained_betas"])
    kind, times = scheduler.get("beta_schedule"), scheduler.get("num_train_timesteps")
    if kind is None:
        raise DataError(f"scheduler_config.json of the model has no betas ({scheduler.get('_class_name')})", hint=_HINT)
    if kind not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        raise DataError(f"scheduler_config.json: beta_schedule is {kind!r}, which is not known here", hint=_HINT)
    if isinstance(times, bool) or not isinstance(times, int) or not 1 <= times <= _MOST_TIMES:
        raise DataError(f"scheduler_config.json: num_train_timesteps is {times!r}", hint=_HINT)
    if kind == "squaredcos_cap_v2":
        return "cosine", _cosine(times)
    first, last = _share(scheduler, "beta_start"), _share(scheduler, "beta_end")
    if kind == "linear":
        return f"linear from {first:g} to {last:g}", np.linspace(first, last, times)
    # not the betas are evenly spaced but their roots (Rombach et al. 2022, released code)
    return f"scaled linear from {first:g} to {last:g}", np.linspace(math.sqrt(first), math.sqrt(last), times) ** 2


def _share(scheduler: Mapping[str, Any], name: str) -> float:
    value = scheduler.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise DataError(f"scheduler_config.json: {name} is {value!r}; it must be between 0 and 1", hint=_HINT)
    return float(value)


def _trained(values: Any) -> NDArray[np.float64]:
    numbers = isinstance(values, list) and all(isinstance(v, int | float) and 0 <= v <= 1 for v in values)
    if not (numbers and 1 <= len(values) <= _MOST_TIMES):
        raise DataError("scheduler_config.json: trained_betas must be numbers from 0 to 1", hint=_HINT)
    return np.array(values, dtype=np.float64)


def _cosine(times: int) -> NDArray[np.float64]:
    """Betas whose products follow cos^2, each at most 0.999 (Nichol & Dhariwal 2021, equation 17, s = 0.008)."""
    left = np.array([math.cos((t / times + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(times + 1)])
    betas: NDArray[np.float64] = np.minimum(1 - left[1:] / left[:-1], 0.999)
    return betas


def _alpha_bars(betas: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.cumprod(1 - betas))


def _without_end(alpha_bars: Tensor) -> Tensor:
    """Roots shifted and scaled so that the last is 0 and the first stays (Lin et al. 2023, algorithm 1)."""
    roots = alpha_bars.sqrt()
    if roots[0] == roots[-1]:
        raise DataError("scheduler_config.json: rescale_betas_zero_snr needs more than one time", hint=_HINT)
    return ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
