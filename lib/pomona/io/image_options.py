"""The options of every command that reads images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pomona.errors import UsageError

LARGEST_SIDE = 4096


@dataclass(frozen=True)
class ImageOptions:
    """Where images, their labels and their names are, and what becomes of those that cannot be read."""

    panel: ClassVar[str] = "Images"

    image_field: Annotated[str, "field that holds the image: bytes, or the path of a file"] = "image"
    label_field: Annotated[str, "field that holds the label; in a folder of folders the folder's name does"] = "label"
    id_field: Annotated[str, "field that names the image; without it, its file or its place does"] = "id"
    image_size: Annotated[
        int | None, "scale the short side to this many pixels and crop the middle; by default as the model takes them"
    ] = None
    rejects: Annotated[
        Path | None,
        "set unreadable images aside here, with reasons, and finish with exit 3; without it the first stops the run",
    ] = None

    def __post_init__(self) -> None:
        if self.image_size is not None and not 1 <= self.image_size <= LARGEST_SIDE:
            raise UsageError(f"--image-size is {self.image_size}; it must be from 1 to {LARGEST_SIDE}")
