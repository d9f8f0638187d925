"""The standard pipeline that every image goes through: random crops, mirroring, and Cutout's hole."""

from __future__ import annotations

import torch
from torch import Tensor

from pomona.methods.madaug_train.operations.affine import PIXEL, move


def standard(images: Tensor, offsets: Tensor, mirror: Tensor, padding: int) -> Tensor:
    """Crops of the size of the images (B, C, H, W), uint8, from the same framed by `padding` zeros; some mirrored.

    Args:
        offsets: (B, 2) int64, column and row that the crop begins in, 0 to 2 `padding`; `padding` is the middle.
        mirror: (B,) bool: left and right change places.
    """
    across, down = (offsets - padding).unbind(1)
    none = torch.zeros_like(across)
    # Column x of a mirrored crop is column W - 1 - x of the crop.
    steps = torch.where(mirror, -1, 1)
    starts = across + mirror * (images.shape[3] - 1)
    found = images.clone()
    move(found, torch.stack((steps, none, starts, none, none + 1, down), 1).int() * PIXEL)
    return found


def holes(batch: Tensor, centres: Tensor, side: int) -> Tensor:
    """The batch (B, C, H, W), normalised, with a square of zeros in each image, clipped at the edges.

    Cutout of DeVries & Taylor (arXiv 1708.04552): the square begins half its side before the pixel in its middle.

    Args:
        centres: (B, 2) float32 in [0, 1), x and y as shares of the width and the height.
        side: in pixels.
    """
    height, width = batch.shape[2:]
    left, top = (centres * centres.new_tensor([width, height])).floor_().sub_(side // 2)[..., None].unbind(1)
    x, y = torch.arange(width, device=batch.device), torch.arange(height, device=batch.device)
    columns, rows = (x < left) | (x >= left + side), (y < top) | (y >= top + side)
    return batch * (columns[:, None] | rows[:, :, None])[:, None].to(batch.dtype)
