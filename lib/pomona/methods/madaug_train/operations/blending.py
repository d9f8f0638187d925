"""Operations that draw an image to one made of it, or away: to its grey copy (Color), to a blurred one (Sharpness).

Pillow blends in single precision and drops what is behind the point.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pomona.methods.madaug_train.operations.placing import beside


def factors(images: Tensor, bounds: list[int], values: NDArray[np.float64], centres: NDArray[np.float64]) -> Tensor:
    """What `colour` and `sharpen` take: the values (n,) as float32, where the images are."""
    return beside(images, values.astype(np.float32))


def blended(degenerate: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """``degenerate + factor (image - degenerate)``, kept in 0 to 255, as uint8; factors above 1 lead away from it."""
    start = degenerate.float()
    mixed = (images.float() - start).mul_(factors).add_(start).clamp_(0, 255)
    return mixed.short().byte()  # at once it would take twice as long on a CPU


def luma(images: Tensor) -> Tensor:
    """ITU-R 601-2 luma of (n, 3, ...), of weights in 2^-16 as Pillow has it: int32 (n, ...)."""
    red, green, blue = images.int().unbind(1)
    return (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768) >> 16


def colour(images: Tensor, factors: Tensor) -> None:
    """Change the colour of the images (n, 3, H, W) by `factors` (n,) float32, in place."""
    images.copy_(blended(luma(images)[:, None], images, factors[:, None, None, None]))


def sharpen(images: Tensor, factors: Tensor) -> None:
    """Sharpen the images (n, C, H, W), but for frames of one pixel, by `factors` (n,) float32, in place.

    The blur is the mean of 3 x 3 pixels, the middle one counted five times.
    """
    levels = images.short()
    inside = images[:, :, 1:-1, 1:-1]
    down = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
    total = down[..., :-2] + down[..., 1:-1] + down[..., 2:] + 4 * levels[:, :, 1:-1, 1:-1]
    # An integer by 13, and a half, is 1/26 or more from the integer above it: rounding cannot reach that.
    blurred = total.float().mul_(1 / 13).add_(0.5).floor_()
    inside.copy_(blended(blurred, inside, factors[:, None, None, None]))
