"""Operations that move pixels: every pixel takes the nearest one of where an affine map leads, or 0 outside.

Coordinates are fixed point with 16 bits behind the point, as Pillow's, so that ties fall alike.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.methods.madaug_train.operations.placing import axes, beside

NAMES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Flip")
"""In the order in which `maps` takes them."""

PIXEL = 1 << 16
"""The step from a pixel to the next, in fixed point."""


def maps(images: Tensor, bounds: list[int], values: NDArray[np.float64], centres: NDArray[np.float64]) -> Tensor:
    """Where the source of each pixel lies, in 2^-16 pixels: x at ``a x + b y + c`` and y at ``d x + e y + f``.

    Args:
        images: (n, C, H, W).
        bounds: where the images of each of `NAMES` begin, and n.
        values: (n,), a shear, a shift as a share of the side, or degrees.

    Returns:
        a to f, (n, 6) int32.
    """
    height, width = images.shape[2:]
    shear_x, shear_y, translate_x, translate_y, rotate, flip = map(slice, bounds[:-1], bounds[1:])
    found = np.empty((len(values), 6))
    found[:] = (1, 0, 0, 0, 1, 0)
    found[shear_x, 1] = values[shear_x]
    found[shear_y, 3] = values[shear_y]
    if rotate.start < rotate.stop:
        found[rotate] = _rotations(values[rotate], width, height)
    found[flip, 0], found[flip, 2] = -1, width
    # The map is that of the pixels' middles.
    found[:, 2] += (found[:, 0] + found[:, 1]) / 2
    found[:, 5] += (found[:, 3] + found[:, 4]) / 2
    # Shifts are rounded to whole pixels, and not in fixed point.
    found[translate_x, 2] = np.floor(values[translate_x] * width + 0.5)
    found[translate_y, 5] = np.floor(values[translate_y] * height + 0.5)
    return beside(images, np.floor(found * PIXEL + 0.5).astype(np.int32))


def _rotations(degrees: NDArray[np.float64], width: int, height: int) -> NDArray[np.float64]:
    """Maps (n, 6) of turns counterclockwise around the middle."""
    angles = degrees % 360 * -(math.pi / 180)
    cos, sin = np.cos(angles).round(15), np.sin(angles).round(15)
    x, y = width / 2, height / 2
    return np.array((cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)).T


def move(images: Tensor, maps: Tensor) -> None:
    """Move the pixels of the images (n, C, H, W) along `maps` (n, 6) int32, in place."""
    n, channels, height, width = images.shape
    across, down = axes(height, width, images.device)
    by_x, by_y, start = maps.view(n, 2, 3, 1, 1).unbind(2)
    x, y = (by_x * across + (by_y * down + start)).bitwise_right_shift_(16).unbind(1)
    # The sign of one of these is set outside; comparisons take several times as long on a CPU.
    inside = (x | y).bitwise_or_(width - 1 - x).bitwise_or_(height - 1 - y).bitwise_right_shift_(31).bitwise_not_()
    source = (y * width).add_(x).bitwise_and_(inside).view(n, 1, -1)
    flat = images.view(n, channels, -1)
    found = torch.gather(flat, 2, source.long().expand(-1, channels, -1))
    torch.bitwise_and(found, inside.byte().view(n, 1, -1), out=flat)
