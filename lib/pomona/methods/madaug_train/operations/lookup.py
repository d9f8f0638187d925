"""Operations that look every level up in a table of 256: inverting, solarizing, posterizing, brightness, contrast.

What Pillow computes level by level in Python, or pixel by pixel in C, is here a table for each image, or for each of
its channels, and one gather for all of them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.methods.madaug_train.operations.blending import blended, factors, luma
from pomona.methods.madaug_train.operations.placing import beside, block

NAMES = ("Invert", "Solarize", "Posterize", "Brightness", "Contrast", "AutoContrast", "Equalize")
"""In the order in which `tables` takes them."""

_LEVELS = np.arange(256, dtype=np.uint8)


def look_up(images: Tensor, tables: Tensor) -> None:
    """Replace the levels of the images (n, C, H, W) by those in `tables` (n, C, 256), in place."""
    flat = images.flatten(2)
    torch.gather(tables, 2, flat.long(), out=flat)


def tables(images: Tensor, bounds: list[int], values: NDArray[np.float64], centres: NDArray[np.float64]) -> Tensor:
    """What each level of the images (n, C, H, W) becomes: (n, C, 256).

    Args:
        bounds: where the images of each of `NAMES` begin, and n.
        values: (n,), a threshold, a number of bits or a factor.
    """
    n, channels = images.shape[:2]
    flat, together = images.flatten(2), block(images)
    contrast, autocontrast, equalize = bounds[4:7]
    found = flat.new_empty(n, channels, 256)
    if contrast:
        found[:contrast] = beside(images, _alike(bounds, values))[:, None]
    if autocontrast > contrast:
        grey = torch.cat([_mean_grey(some) for some in torch.split(flat[contrast:autocontrast], together)])
        factor = factors(images, bounds, values[contrast:autocontrast], centres)[:, None]
        found[contrast:autocontrast] = blended(grey, _levels(images.device, torch.float32), factor)[:, None]
    if equalize > autocontrast:
        found[autocontrast:equalize] = _autocontrast(flat[autocontrast:equalize])
    if n > equalize:
        found[equalize:] = torch.cat([_equalize(some) for some in torch.split(flat[equalize:], together)])
    return found


def _alike(bounds: list[int], values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Tables (m, 256) of the operations before Contrast, which do the same to every image."""
    solarize, posterize, brightness, end = bounds[1:5]
    found = np.empty((end, 256), np.uint8)
    found[:solarize] = ~_LEVELS
    found[solarize:posterize] = np.where(values[solarize:posterize, None] > _LEVELS, _LEVELS, ~_LEVELS)
    dropped = 8 - values[posterize:brightness, None].astype(np.uint8)
    found[posterize:brightness] = _LEVELS >> dropped << dropped
    found[brightness:] = np.minimum(_LEVELS * values[brightness:end, None].astype(np.float32), 255)
    return found


@lru_cache(8)
def _levels(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=dtype, device=device)


def _mean_grey(images: Tensor) -> Tensor:
    """Mean luma of (n, C, H W), rounded half up: (n, 1)."""
    grey = images[:, 0] if images.shape[1] == 1 else luma(images)
    pixels = grey.shape[1]
    return (grey.sum(1, keepdim=True, dtype=torch.int64) * 2 + pixels) // (2 * pixels)


def _autocontrast(images: Tensor) -> Tensor:
    """Tables (n, C, 256) that stretch what is there, (n, C, H W), from 0 to 255."""
    low, high = images.amin(2, keepdim=True).double(), images.amax(2, keepdim=True).double()
    scale = torch.full_like(low, 255).div_(high - low)  # 255 / tensor would be a product, which rounds twice
    level = _levels(images.device, torch.float64)
    # In float64 and in this order, since Pillow drops what is behind the point.
    stretched = (level * scale).sub_(low * scale).clamp_(0, 255)
    return torch.where(high > low, stretched, level).byte()


def _equalize(images: Tensor) -> Tensor:
    """Tables (n, C, 256) that spread the levels of (n, C, H W) evenly."""
    n, channels, pixels = images.shape
    levels = images.long()
    one = torch.ones((), dtype=torch.int32, device=images.device)
    counts = one.new_zeros(n, channels, 256).scatter_add_(2, levels, one.expand(levels.shape))
    brightest = counts.gather(2, images.amax(2, keepdim=True).long())
    step = (pixels - brightest) // 255
    below = counts.cumsum(2, dtype=torch.int32) - counts
    spread = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, spread, _levels(images.device, torch.int32)).byte()
