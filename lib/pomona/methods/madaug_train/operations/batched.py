"""Augments whole batches on the device they are on, with the pixels that Pillow would give.

In each slot the images are sorted by what is done to them, so that a kernel works on a run of them: one look-up for
seven operations, one gather for the six that move pixels, and one kernel each for Color, Sharpness and Cutout. Numbers
that an operation depends on are computed in float64 on the host, alike for all devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.methods.madaug_train.operations import affine, blending, cutout, lookup
from pomona.methods.madaug_train.operations.placing import beside, block
from pomona.methods.madaug_train.operations.table import Operation

# Of each kind its operations, what gives a row of parameters for each image, and what changes images by them.
_KINDS = (
    (lookup.NAMES, lookup.tables, lookup.look_up),
    (affine.NAMES, affine.maps, affine.move),
    (("Color",), blending.factors, blending.colour),
    (("Sharpness",), blending.factors, blending.sharpen),
    (cutout.NAMES, cutout.holes, cutout.cut_out),
)
_ORDER = ("Identity", *(name for names, _, _ in _KINDS for name in names))


@dataclass(frozen=True)
class Chain:
    """What is done to each of B images, in k slots, one after the other.

    Attributes:
        operations: (B, k) int64, places in the operations that are given beside it; -1 does nothing.
        magnitudes: (B, k) float32 in [0, 1].
        mirrored: (B, k) bool: turns the sign of what is signed.
        centres: (B, k, 2) float32 in [0, 1): x and y of Cutout's hole, as shares of the width and the height.
    """

    operations: Tensor
    magnitudes: Tensor
    mirrored: Tensor
    centres: Tensor


def augmented(images: Tensor, operations: Sequence[Operation], chain: Chain) -> Tensor:
    """The images (B, C, H, W), uint8 of 1 or 3 channels, as `chain` changes them."""
    places = chain.operations.cpu().numpy()
    values = _values(operations, places, chain.magnitudes, chain.mirrored)
    centres = chain.centres.cpu().numpy().astype(np.float64)
    ranks = _ranks(tuple(operations), images.shape)[places]
    lies = np.arange(len(images))  # in which row an image is
    for slot in range(places.shape[1]):
        order = np.argsort(ranks[:, slot], kind="stable")
        images = _rows(images, lies[order])
        _change(images, ranks[order, slot], values[order, slot], centres[order, slot])
        lies[order] = np.arange(len(images))
    return _rows(images, lies)


def every(
    images: Tensor, operations: Sequence[Operation], magnitudes: Tensor, mirrored: Tensor, centres: Tensor
) -> Tensor:
    """The images (B, C, H, W) under each of the K `operations`: (B, K, C, H, W).

    Args:
        magnitudes: (B, K) float32 in [0, 1].
        mirrored: (B, K) bool.
        centres: (B, K, 2) float32 in [0, 1).
    """
    count, together = len(operations), block(images)
    places = np.tile(np.arange(count), (len(images), 1))
    values = _values(operations, places, magnitudes, mirrored)
    shares = centres.cpu().numpy().astype(np.float64)
    ranks = _ranks(tuple(operations), images.shape)[places]
    found = images.new_empty(len(images), count, *images.shape[1:])
    for first in range(0, len(images), together):
        some = slice(first, first + together)
        order = np.argsort(ranks[some], axis=None, kind="stable")
        rows = _rows(images[some], order // count)
        of_rows = ranks[some].reshape(-1)[order], values[some].reshape(-1)[order], shares[some].reshape(-1, 2)[order]
        _change(rows, *of_rows)
        torch.index_select(rows, 0, beside(images, np.argsort(order)), out=found[some].flatten(0, 1))
    return found


@lru_cache
def _ranks(operations: tuple[Operation, ...], shape: torch.Size) -> NDArray[np.int16]:
    """The place in `_ORDER` of each operation and, last, of none: those that leave such images alone are none."""
    _, channels, height, width = shape
    idle = {"Color"} if channels == 1 else set()
    if min(height, width) < 3:
        idle.add("Sharpness")
    if height * width < 256:  # there are more levels than pixels to spread
        idle.add("Equalize")
    return np.array([0 if each.name in idle else _ORDER.index(each.name) for each in operations] + [0], np.int16)


@lru_cache
def _ranges(operations: tuple[Operation, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Of each operation its lowest value, how much there is above it, and whether its sign turns."""
    low, high, signed = zip(*((each.low, each.high, each.signed) for each in operations), strict=True)
    return np.array(low, np.float64), np.array(high, np.float64) - np.array(low, np.float64), np.array(signed)


def _values(
    operations: Sequence[Operation], places: NDArray[np.int64], magnitudes: Tensor, mirrored: Tensor
) -> NDArray[np.float64]:
    """What the magnitudes mean to the operations at `places`, of their shape."""
    low, span, signed = _ranges(tuple(operations))
    values: NDArray[np.float64] = low[places] + magnitudes.cpu().numpy().astype(np.float64) * span[places]
    return np.negative(values, out=values, where=signed[places] & mirrored.cpu().numpy())


def _rows(images: Tensor, rows: NDArray[np.int64]) -> Tensor:
    return images.index_select(0, beside(images, rows))


def _change(
    images: Tensor, ranks: NDArray[np.int16], values: NDArray[np.float64], centres: NDArray[np.float64]
) -> None:
    """Change `images`, sorted by their `ranks`, in place."""
    bounds = np.searchsorted(ranks, np.arange(1, len(_ORDER) + 1)).tolist()
    together = block(images)
    for names, parameters, kernel in _KINDS:
        own, bounds = bounds[: len(names) + 1], bounds[len(names) :]
        start, stop = own[0], own[-1]
        if start == stop:
            continue
        run = images[start:stop]
        given = parameters(run, [bound - start for bound in own], values[start:stop], centres[start:stop])
        for first in range(0, stop - start, together):
            kernel(run[first : first + together], given[first : first + together])
