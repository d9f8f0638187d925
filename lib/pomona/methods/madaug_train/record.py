"""What is kept of a policy as it changes: how it sees the same images at the end of each epoch, and what it makes of
some of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from pomona.methods.madaug_train.choosing import Choice
from pomona.methods.madaug_train.operations.choice import Backend
from pomona.methods.madaug_train.operations.table import strength
from pomona.methods.madaug_train.table import HISTORY

MOMENTS = ("first", "middle", "last")
"""Epochs at the end of which strips are made."""

_IMAGES = 1000
_SHOWN = 6
_DRAWS = 6


def sample(labels: NDArray[np.int64], random: Generator) -> NDArray[np.int64]:
    """Places of at most 1,000 images to watch, class after class in turn; more where there are more classes.

    Args:
        labels: of all images.
    """
    order = random.permutation(len(labels))
    ordered = labels[order]
    by_class = np.argsort(ordered, kind="stable")
    sizes = np.bincount(ordered)
    turn = np.empty(len(labels), np.int64)
    turn[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return order[np.argsort(turn, kind="stable")][: max(_IMAGES, np.count_nonzero(sizes))]


def best_epoch(rows: Sequence[Mapping[str, Any]]) -> int:
    """The first of the epochs that are best in validation, from 0; of `rows` as metrics.jsonl has them."""
    accuracies = [row["val_accuracy"] for row in rows]
    return accuracies.index(max(accuracies))


def moments(epochs: int) -> dict[str, int]:
    """The epochs, from 0, of `MOMENTS`."""
    return dict(zip(MOMENTS, (0, epochs // 2, epochs - 1), strict=True))


def watched(
    choice: Choice, images: Tensor, labels: NDArray[np.int64], classes: int, batch: int
) -> tuple[NDArray[np.float32], float, float]:
    """How the policy sees `images`, (N, C, H, W), uint8, so many at a time.

    Returns:
        By class and operation the numbers of `HISTORY`, (classes, K, 6), those of all images where there are none of a
        class; the mean entropy of the choice as a share of its largest; and the mean over images of the strengths of
        the operations, each weighted by its probability.
    """
    assert choice.outlook is not None
    seen = [choice.outlook(part) for part in torch.split(images, batch)]
    logits, magnitudes = (torch.cat(parts).double().cpu() for parts in zip(*seen, strict=True))
    logs = (logits / choice.temperature).log_softmax(-1)
    probabilities, lam = logs.exp().numpy(), magnitudes.numpy()
    strengths = strength(choice.operations, lam)
    entropy = -(probabilities * logs.numpy()).sum(-1).mean() / math.log(len(choice.operations))
    everything = np.stack([probabilities, lam, strengths], -1)  # (N, K, 3)
    found = np.empty((classes, len(choice.operations), 3, 2), np.float32)
    for each in range(classes):
        own = everything[labels == each]
        own = own if len(own) else everything
        found[each] = np.stack([own.mean(0), own.std(0)], -1)
    figures = found.reshape(classes, len(choice.operations), len(HISTORY))
    return figures, float(entropy), float((probabilities * strengths).sum(-1).mean())


def strips(choice: Choice, images: Tensor, backend: Backend, randoms: Mapping[str, Generator]) -> Tensor:
    """The first six of `images`, each as it is and six times augmented: (6, 7, C, H, W), uint8."""
    shown = images[:_SHOWN]
    repeated = shown.repeat_interleave(_DRAWS, 0)
    outlook = choice.outlook(repeated) if choice.outlook is not None else None
    drawn = backend.augmented(repeated, choice.operations, choice.drawn(outlook, len(repeated), randoms))
    return torch.cat([shown[:, None], drawn.view(len(shown), _DRAWS, *drawn.shape[1:])], 1)


def strip_shape(images: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what `strips` makes of images of the shape (N, C, H, W)."""
    return min(_SHOWN, images[0]), 1 + _DRAWS, *images[1:]
