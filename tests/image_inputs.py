"""Inputs of images for tests: small ones with known pixels, put where a test wants them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pomona.io.image_options import ImageOptions
from pomona.io.images import Images, Picture
from pomona.io.records import Reject

ARRAYS = np.random.default_rng(3).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
LABELS = ["ape", "ape", "ape", "bee", "bee", "cow"]
"""Of six images."""


def png(array: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def put(folder: Path, *names: str) -> Path:
    """`folder` with an image under each name, `ARRAYS` in turn."""
    for place, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(ARRAYS[place % len(ARRAYS)]))
    return folder


def opened(*inputs: object, limit: int | None = None, **options: Any) -> Images:
    return Images([str(name) for name in inputs], ImageOptions(**options), limit=limit)


def pictures(*inputs: object, **options: Any) -> list[Picture]:
    found = list(opened(*inputs, **options))
    assert all(isinstance(item, Picture) for item in found), found
    return [item for item in found if isinstance(item, Picture)]


def reasons(*inputs: object, **options: Any) -> list[str]:
    return [f"{item.line}: {item.reason}" for item in opened(*inputs, **options) if isinstance(item, Reject)]


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
