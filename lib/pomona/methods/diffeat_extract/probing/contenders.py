"""What is probed, and by what: features of the model, of the same network with random weights, and raw pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pomona.methods.diffeat_extract.config import ProbeOptions, whole_numbers
from pomona.methods.diffeat_extract.heads import learning, modules
from pomona.methods.diffeat_extract.probing.logistic import logistic
from pomona.methods.diffeat_extract.probing.splits import Task
from pomona.runtime.progress import Quiet

_BATCH, _SMALL_BATCH = 128, 16
_FEW = 2_000  # images, of which the released batch would make too few steps

Kind = Literal["features", "random", "pixels"]
Indices = NDArray[np.int64]
Fit = Callable[[Task, Indices, int], Indices]
"""(task, images to learn from, seed) to the class predicted for each of ``task.test``."""


@dataclass(frozen=True)
class Contender:
    """Something to classify by.

    Attributes:
        column: name of the features.
        fit: learns from some images and predicts the others.
    """

    kind: Kind
    column: str
    fit: Fit


def on_vectors(
    config: ProbeOptions,
    kind: Kind,
    column: str,
    vectors: NDArray[np.float32],
    *,
    views: int,
    channels: int,
    device: torch.device,
) -> Contender:
    """The classifier of ``--probe`` on features.

    Args:
        vectors: (images x views, channels x cells), the views of an image following one another; tests are made on
            the first, the middle crop.
    """

    def fit(task: Task, rows: Indices, seed: int) -> Indices:
        learned, tested = _rows(rows, views), task.test * views
        if config.probe == "linear" and config.linear == "logistic":
            targets = np.repeat(task.labels[rows], views)
            return logistic(vectors[learned], targets, vectors[tested], penalty=config.penalty)
        side = round((vectors.shape[1] // channels) ** 0.5)

        def inputs(chosen: Indices) -> tuple[Tensor, ...]:
            found = torch.from_numpy(np.asarray(vectors[chosen], dtype=np.float32))
            return (found.reshape(-1, channels, side, side) if config.probe == "attention" else found,)

        classes = len(task.names)
        if config.probe == "attention":
            module: nn.Module = modules.Attention(channels, side, classes, seed=seed)
        else:
            hidden = whole_numbers(config.hidden, "--hidden") if config.probe == "mlp" else ()
            module = modules.mlp(vectors.shape[1], hidden, classes, seed=seed)
        labels = np.repeat(task.labels, views)
        return trained(module.to(device), config.probe, config, inputs, labels, learned, tested, seed)

    return Contender(kind, column, fit)


def on_maps(
    module: Callable[[int, int], nn.Module],
    name: str,
    config: ProbeOptions,
    kind: Kind,
    column: str,
    inputs: learning.Inputs,
    *,
    device: torch.device,
) -> Contender:
    """A head of the successor on what `inputs` gives of the images at some places.

    Args:
        module: (classes, seed) to a fresh head.
        name: of the head, which decides its step size.
    """

    def fit(task: Task, rows: Indices, seed: int) -> Indices:
        head = module(len(task.names), seed).to(device)
        return trained(head, name, config, inputs, task.labels, rows, task.test, seed)

    return Contender(kind, column, fit)


def trained(
    module: nn.Module,
    name: str,
    config: ProbeOptions,
    inputs: learning.Inputs,
    labels: Indices,
    learned: Indices,
    tested: Indices,
    seed: int,
) -> Indices:
    """Predictions for `tested` of a head that learned from `learned` by the released recipe."""
    rate = config.head_rate if config.head_rate is not None else learning.RATES[name]
    few = name == "diffeed" or len(learned) < _FEW
    batch = config.head_batch if config.head_batch is not None else _SMALL_BATCH if few else _BATCH
    learning.learn(
        module, inputs, labels, learned, epochs=config.epochs, batch=batch, rate=rate, seed=seed, progress=Quiet()
    )
    return learning.predict(module, inputs, tested, batch=batch)


def stacked(parts: Sequence[NDArray[np.float32]], shapes: Sequence[tuple[int, int]]) -> learning.Inputs:
    """Vectors of several columns, each (images, channels x cells), as the maps that a head takes."""

    def inputs(chosen: Indices) -> tuple[Tensor, ...]:
        return tuple(
            torch.from_numpy(np.asarray(part[chosen], dtype=np.float32)).reshape(-1, channels, side, side)
            for part, (channels, side) in zip(parts, shapes, strict=True)
        )

    return inputs


def _rows(images: Indices, views: int) -> Indices:
    """The rows of all views of `images`."""
    rows: Indices = (images[:, None] * views + np.arange(views)).ravel()
    return rows
