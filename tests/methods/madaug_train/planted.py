"""Digits whose validation and test images differ from those to learn from in a way that one operation can mimic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

_OWN = 20
"""Of each class to learn from, and as many to learn the policy on; all others are to test on."""


def inverted(images: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    """Half of `images`, (N, 8, 8), the other way round."""
    half = random.permutation(len(images)) < len(images) // 2
    return np.where(half[:, None, None], 255 - images, images)


def shifted(images: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    """Each of `images`, (N, 8, 8), moved by -3..3 pixels in x, with nothing where it came from."""
    shifts = random.integers(-3, 4, len(images))
    columns = np.arange(8) - shifts[:, None]
    moved = np.take_along_axis(images, columns.clip(0, 7)[:, None, :].repeat(8, 1), 2)
    return np.where(((columns >= 0) & (columns < 8))[:, None, :], moved, 0).astype(np.uint8)


_CHANGES = {"ordinary": lambda images, random: images, "inverted": inverted, "shifted": shifted}
ROWS = tuple(_CHANGES)


def write(path: Path, row: str, seed: int) -> Path:
    """`path`, an .npz of 200, 200 and 1,397 digits drawn under `seed`, those to learn from as they are."""
    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    rank = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    parts = {"train": rank < _OWN, "val": (rank >= _OWN) & (rank < 2 * _OWN), "test": rank >= 2 * _OWN}
    arrays = {}
    for part, wanted in parts.items():
        places = order[wanted]
        own = pixels[places]
        arrays[f"x_{part}"] = own if part == "train" else _CHANGES[row](own, random)
        arrays[f"y_{part}"] = labels[places]
    np.savez(path, **arrays)
    return path
