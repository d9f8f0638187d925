"""What is done to each image: the curriculum's coin, and operations drawn with their magnitudes.

Random numbers are drawn on the CPU and moved, so that every device sees the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from pomona.methods.madaug_train.operations.batched import Chain

STREAMS = ("operations", "magnitudes", "mirrored", "centres")
"""The generators that a chain is drawn from: one for each thing, so that none depends on how much another took."""


def coins(random: Generator, probability: float, n: int) -> NDArray[np.bool_]:
    """Which of `n` images are augmented, (n,): each by its own coin, never at 0 and always at 1."""
    return random.random(n) < probability


def chain(
    logits: Tensor,
    magnitudes: Tensor,
    *,
    k: int,
    temperature: float,
    jitter: float,
    randoms: Mapping[str, Generator],
) -> Chain:
    """`k` operations for each image, without replacement, in the order in which they are applied.

    The largest of logits with Gumbel noise, from the largest on, are what successive draws from the softmax give when
    what was drawn is left out (Yellott 1977): in the released code, `multinomial`.

    Args:
        logits: (B, K), of which the softmax at `temperature` is drawn from.
        magnitudes: (B, K) in [0, 1], each moved by up to `jitter` either way when drawn, and clipped.
        randoms: a generator for each of `STREAMS`.
    """
    images, operations = logits.shape
    gumbel = _moved(-np.log(randoms["operations"].standard_exponential((images, operations))), logits)
    drawn = (logits.detach() / temperature + gumbel).topk(k, dim=-1).indices
    shifts = _moved(randoms["magnitudes"].uniform(-jitter, jitter, (images, k)), logits)
    moved = (magnitudes.detach().gather(-1, drawn) + shifts).clamp(0, 1)
    return Chain(drawn, moved.float(), *signs_and_centres((images, k), randoms, logits.device))


def uniform_chain(n: int, operations: int, k: int, randoms: Mapping[str, Generator]) -> Chain:
    """`k` of `operations` for each of `n` images, all alike likely, with magnitudes uniform in [0, 1]; on the CPU."""
    drawn = randoms["operations"].random((n, operations)).argsort(axis=-1)[:, :k]
    magnitudes = randoms["magnitudes"].random((n, k), dtype=np.float32)
    signs = signs_and_centres((n, k), randoms, torch.device("cpu"))
    return Chain(torch.from_numpy(drawn), torch.from_numpy(magnitudes), *signs)


def signs_and_centres(
    shape: tuple[int, int], randoms: Mapping[str, Generator], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which signs are flipped, `shape`, each with probability 1/2; and centres of holes, (*shape, 2) in [0, 1)."""
    mirrored = torch.from_numpy(randoms["mirrored"].random(shape) < 0.5)
    centres = torch.from_numpy(randoms["centres"].random((*shape, 2), dtype=np.float32))
    return mirrored.to(device), centres.to(device)


def _moved(values: NDArray[np.float64], like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device, like.dtype)
