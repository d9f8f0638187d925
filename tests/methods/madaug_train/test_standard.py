"""The standard pipeline: crops from a frame of zeros, mirroring, and Cutout's hole, beside loops over images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pomona.methods.madaug_train.standard import holes, standard


@pytest.mark.parametrize(
    ("channels", "height", "width", "padding"), [(3, 12, 12, 4), (1, 8, 5, 2), (3, 6, 9, 0), (1, 3, 2, 5)]
)
def test_crops_come_from_a_frame_of_zeros_and_may_be_mirrored(
    channels: int, height: int, width: int, padding: int
) -> None:
    random = np.random.default_rng(1)
    images = random.integers(1, 256, (50, channels, height, width), dtype=np.uint8)
    offsets = random.integers(0, 2 * padding + 1, (50, 2))
    mirror = random.random(50) < 0.5
    given = torch.from_numpy(images)
    found = standard(given, torch.from_numpy(offsets), torch.from_numpy(mirror), padding).numpy()
    frame = ((0, 0), (padding, padding), (padding, padding))
    for image, (left, top), turned, crop in zip(images, offsets, mirror, found, strict=True):
        wanted = np.pad(image, frame)[:, top : top + height, left : left + width]
        np.testing.assert_array_equal(crop, wanted[..., ::-1] if turned else wanted)
    np.testing.assert_array_equal(given.numpy(), images)


@pytest.mark.parametrize("side", [16, 1, 3, 40])
def test_holes_are_squares_of_zeros_clipped_at_the_edges(side: int) -> None:
    random = np.random.default_rng(2)
    batch = random.normal(size=(60, 2, 32, 20)).astype(np.float32)
    centres = random.random((60, 2), dtype=np.float32)
    centres[:2] = [[0, 0], [1 - 2**-24, 1 - 2**-24]]
    given = torch.from_numpy(batch)
    found = holes(given, torch.from_numpy(centres), side).numpy()
    for image, (x, y), hollow in zip(batch, centres, found, strict=True):
        left, top = int(x * np.float32(20)) - side // 2, int(y * np.float32(32)) - side // 2
        wanted = image.copy()
        wanted[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 0
        np.testing.assert_array_equal(hollow, wanted)
    np.testing.assert_array_equal(given.numpy(), batch)
