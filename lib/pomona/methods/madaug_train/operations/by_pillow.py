"""Augments image by image with Pillow: for large images on a CPU, and to hold batches against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.methods.madaug_train.operations.table import GREY_HOLE, HOLE, Operation

if TYPE_CHECKING:
    from PIL.Image import Image

    from pomona.methods.madaug_train.operations.batched import Chain


def augmented(images: Tensor, operations: Sequence[Operation], chain: Chain) -> Tensor:
    """The images (B, C, H, W), uint8 of 1 or 3 channels, as `chain` changes them."""
    slots = [each.tolist() for each in (chain.operations, chain.magnitudes, chain.mirrored, chain.centres)]
    found = np.empty(images.shape, np.uint8)
    for row, (pixels, *of_image) in enumerate(zip(images.cpu().numpy(), *slots, strict=True)):
        image = _image(pixels)
        for place, magnitude, mirrored, centre in zip(*of_image, strict=True):
            if place >= 0:
                image = _applied(image, operations[place], magnitude, mirrored, centre)
        found[row] = _pixels(image)
    return torch.from_numpy(found).to(images.device)


def every(
    images: Tensor, operations: Sequence[Operation], magnitudes: Tensor, mirrored: Tensor, centres: Tensor
) -> Tensor:
    """The images (B, C, H, W) under each of the K `operations`: (B, K, C, H, W), as `batched.every`."""
    given = [each.tolist() for each in (magnitudes, mirrored, centres)]
    found = np.empty((len(images), len(operations), *images.shape[1:]), np.uint8)
    for row, (pixels, *of_image) in enumerate(zip(images.cpu().numpy(), *given, strict=True)):
        image = _image(pixels)
        for place, (operation, *how) in enumerate(zip(operations, *of_image, strict=True)):
            found[row, place] = _pixels(_applied(image, operation, *how))
    return torch.from_numpy(found).to(images.device)


def _image(pixels: NDArray[np.uint8]) -> Image:
    from PIL import Image

    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _pixels(image: Image) -> NDArray[np.uint8]:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _applied(image: Image, operation: Operation, magnitude: float, mirrored: bool, centre: Sequence[float]) -> Image:
    from PIL import ImageEnhance, ImageOps

    value = operation.low + magnitude * (operation.high - operation.low)
    if mirrored and operation.signed:
        value = -value
    match operation.name:
        case "ShearX":
            return _moved(image, (1, value, 0, 0, 1, 0))
        case "ShearY":
            return _moved(image, (1, 0, 0, value, 1, 0))
        case "TranslateX":
            return _moved(image, (1, 0, value * image.width, 0, 1, 0))
        case "TranslateY":
            return _moved(image, (1, 0, 0, 0, 1, value * image.height))
        case "Rotate":
            return image.rotate(value)
        case "Flip":
            return ImageOps.mirror(image)
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Invert":
            return ImageOps.invert(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Solarize":
            levels: Any = value  # a threshold between two levels is one as well
            return ImageOps.solarize(image, levels)
        case "Posterize":
            return ImageOps.posterize(image, int(value))
        case "Contrast":
            return ImageEnhance.Contrast(image).enhance(value)
        case "Color":
            return ImageEnhance.Color(image).enhance(value)
        case "Brightness":
            return ImageEnhance.Brightness(image).enhance(value)
        case "Sharpness":
            return ImageEnhance.Sharpness(image).enhance(value)
        case "Cutout":
            return _cut_out(image, value * image.width, centre) if value > 0 else image
        case "Identity":
            return image
    raise AssertionError(operation.name)


def _moved(image: Image, map_: tuple[float, ...]) -> Image:
    from PIL.Image import Transform

    return image.transform(image.size, Transform.AFFINE, map_)


def _cut_out(image: Image, side: float, centre: Sequence[float]) -> Image:
    from PIL import ImageDraw

    x, y = (int(max(0, at * extent - side / 2)) for at, extent in zip(centre, image.size, strict=True))
    cut = image.copy()
    corners = (x, y, min(image.width, x + side), min(image.height, y + side))
    ImageDraw.Draw(cut).rectangle(corners, HOLE if image.mode == "RGB" else GREY_HOLE)
    return cut
