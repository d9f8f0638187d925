"""Pixels of an image: decoded, upright, in the channels and at the size that are asked for.

Alpha is taken away by laying the image on black, which is what most encoders write where nothing shows. Sixteen bits
lose the lower eight, as Pillow does to colour. Of an animation the first frame counts; colour profiles do not.

The size is reached as in the transform of guided-diffusion's released code: the image is halved by means of 2x2 while
its short side is twice what is wanted or more, then scaled by bicubic interpolation, then cropped. One thing differs:
up to three halvings of a JPEG are its decoder's, which leaves high frequencies out and takes a third of the time.
Pixels then differ by one to three levels of 255 in the mean: means of 2x2 round up each time, and blur odd sizes.
"""

from __future__ import annotations

import io
import logging
import random
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

from pomona.errors import UnavailableError

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray
    from PIL.Image import Image

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .gif .webp .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .avif .jp2 .j2k".split()
)
"""What the names of images end with, in lower case."""
LARGEST = 89_478_485
"""Pixels of the largest image that is decoded, which is where Pillow begins to suspect a bomb."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")  # none that runs a program
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")
_TURNS = {  # of the EXIF tag; names of Pillow's transpositions
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ORIENTATION = 0x0112
_SILENT = re.compile(r"PIL\.")


class Unreadable(Exception):
    """There are no pixels to be had; the argument is the reason, one line."""


def size_of(content: Path | bytes | NDArray[uint8]) -> tuple[int, int, int]:
    """Width and height of the upright image, and its channels, 1 or 3, from the header alone.

    Raises:
        Unreadable: it is no image, or too large.
        UnavailableError: Pillow is not installed.
    """
    if not isinstance(content, Path | bytes):
        return content.shape[1], content.shape[0], 1 if content.ndim == 2 or content.shape[2] == 1 else 3
    with _opened(content) as image:
        channels = 1 if _is_grey(image) else 3
        width, height = image.size
        return (height, width, channels) if _orientation(image) >= 5 else (width, height, channels)


def pixels(content: Path | bytes | NDArray[uint8], *, channels: int, size: int | None) -> NDArray[uint8]:
    """The image as (height, width, channels), contiguous and of its own memory.

    Args:
        channels: 3 repeats grey; 1 takes only grey, which three equal channels are as well.
        size: the short side is scaled to it and the middle is cropped to (size, size); None leaves the size alone.

    Raises:
        Unreadable: it is no image, cut off, damaged, too large, or colour where grey is wanted.
        UnavailableError: Pillow is not installed.
    """
    if not isinstance(content, Path | bytes) and (size is None or content.shape[:2] == (size, size)):
        return _array(content, channels)  # which does without Pillow
    if size is None:
        assert isinstance(content, Path | bytes), "pixels were returned above"
        decoded = _decoded(content, None)
        return _array(_turned(decoded.image, decoded.orientation), channels)
    image = _scaled(content, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return _array(image.crop((left, top, left + size, top + size)), channels)


def cropped(
    content: Path | bytes | NDArray[uint8], *, channels: int, size: int | None, seed: int, mirror: bool
) -> NDArray[uint8]:
    """A random crop, as `pixels` otherwise: its side is 0.8 to 1 of the scaled image's short side (released code).

    Args:
        size: side of the crop; None crops to the width and height that the image has.
        mirror: turn left and right around in half of the crops.
        seed: decides the scale, the place and the mirroring, whatever the image is.
    """
    draw = random.Random(seed)
    width, height = (size, size) if size is not None else size_of(content)[:2]
    least = min(width, height)
    image = _scaled(content, draw.randint(least, -(-least * 5 // 4)))
    top, left = draw.randint(0, image.height - height), draw.randint(0, image.width - width)
    array = _array(image.crop((left, top, left + width, top + height)), channels)
    return array[:, ::-1].copy() if mirror and draw.random() < 0.5 else array


# --- decoding --------------------------------------------------------------------------------------------------------


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise UnavailableError(
            "reading images needs the package Pillow", hint="pip install 'pomona[vision]'"
        ) from error
    return Image


@contextmanager
def _opened(content: Path | bytes) -> Iterator[Image]:
    """The image with its header read; whatever Pillow raises meanwhile becomes `Unreadable`."""
    Image = _pillow()
    # Warnings are of the process, so they cannot be caught here in one thread alone. None of Pillow's matters: what it
    # warns of in an image's size is refused below, and what in its metadata is not used.
    if not any(action == "ignore" and module == _SILENT for action, _, _, module, _ in warnings.filters):
        warnings.filterwarnings("ignore", module=_SILENT.pattern)
        logging.getLogger("PIL").addHandler(logging.NullHandler())
    start = None
    try:
        with _file(content) as file:
            start = file.read(8)
            file.seek(0)
            with Image.open(file, formats=_FORMATS) as image:
                if image.width * image.height > LARGEST:
                    raise Unreadable(f"larger than {LARGEST:,} pixels")
                yield image
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # decoders of damaged files raise all sorts
        raise Unreadable(_why(error, start)) from error


def _file(content: Path | bytes) -> BinaryIO:
    if isinstance(content, bytes):
        return io.BytesIO(content)
    if not stat.S_ISREG(content.stat().st_mode):  # reading a pipe or a device may never end
        raise Unreadable("not a file")
    return content.open("rb")


def _why(error: Exception, start: bytes | None) -> str:
    """What to tell people of an `error` in a file that begins with `start`, None where it could not be opened."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if start == b"":
        return "the file is empty"
    said = str(error).partition("\n")[0]
    if type(error).__name__ == "DecompressionBombError":
        return f"larger than {LARGEST:,} pixels"
    if "truncated" in said.lower():
        return "the file is cut off"
    if type(error).__name__ == "UnidentifiedImageError":
        return (
            "damaged at its beginning"
            if start and start.startswith(_BEGINNINGS)
            else "not an image of a kind that is read"
        )
    return f"damaged: {said or type(error).__name__:.100}"


def _is_grey(image: Image) -> bool:
    """Whether the header says so."""
    if image.mode in ("P", "PA") and image.palette is not None:
        order, colours = image.palette.getdata()
        step = len(order.partition(";")[0])
        return bytes(colours[0::step]) == bytes(colours[1::step]) == bytes(colours[2::step])
    return image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")


def _orientation(image: Image) -> int:
    """How the image is to be turned, as EXIF counts, from what stands before the pixels."""
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    if image.format == "PNG" and not image.info.keys() & {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}:
        return 1  # it would decode the whole file to look behind the pixels
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata leaves the pixels whole
        return 1
    return found if found in _TURNS else 1


def _turned(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    return image.transpose(Transpose[_TURNS[orientation]]) if orientation in _TURNS else image


def _flat(image: Image) -> Image:
    """The decoded image in mode L or RGB."""
    import numpy as np
    from PIL import Image

    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if sixteen_bits:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise Unreadable("its numbers have 32 bits, and nothing says which is white")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _decoded(content: Path | bytes, short: int | None) -> _Decoded:
    """Decode; a JPEG so much smaller as `short` allows."""
    with _opened(content) as image:
        orientation, (width, height) = _orientation(image), image.size
        halvings = 0 if short is None else min(3, _halvings(min(width, height), short))
        drafted = image.draft(None, (width >> halvings, height >> halvings)) if halvings else None
        image.load()
        if drafted is None:
            return _Decoded(_flat(image), image.size, None, orientation)
        return _Decoded(_flat(image), (width >> halvings, height >> halvings), drafted[1], orientation)


# --- scaling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decoded:
    """An image in mode L or RGB, as it is stored.

    Attributes:
        size: width and height that it counts as.
        box: the part of `image` that shows something, where a decoder that halves has filled up the edges.
        orientation: how it is still to be turned.
    """

    image: Image
    size: tuple[int, int]
    box: tuple[int, int, float, float] | None
    orientation: int


def _halvings(side: int, wanted: int) -> int:
    """How often `side` can be halved, rounding down, and be `wanted` or more."""
    return max(0, (side // wanted).bit_length() - 1)


def _scaled(content: Path | bytes | NDArray[uint8], short: int) -> Image:
    """The upright image, scaled so that its short side is `short`."""
    Image = _pillow()
    if isinstance(content, Path | bytes):
        decoded = _decoded(content, short)
    else:
        flat = _flat(Image.fromarray(content[..., 0] if content.shape[2:] == (1,) else content))
        decoded = _Decoded(flat, flat.size, None, 1)
    image, (width, height), box = decoded.image, decoded.size, decoded.box
    for _ in range(_halvings(min(width, height), short)):
        width, height = width // 2, height // 2
        image, box = image.resize((width, height), Image.Resampling.BOX, box), None
    scale = short / min(width, height)
    wide, high = round(width * scale), round(height * scale)
    if wide * high > LARGEST:
        raise Unreadable(f"so narrow that it would have {wide * high:,} pixels at this size")
    return _turned(image.resize((wide, high), Image.Resampling.BICUBIC, box), decoded.orientation)


# --- channels --------------------------------------------------------------------------------------------------------


def _array(image: Image | NDArray[uint8], channels: int) -> NDArray[uint8]:
    import numpy as np

    array = np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[2] == 4:
        array = ((array[..., :3].astype(np.uint16) * array[..., 3:] + 127) // 255).astype(np.uint8)
    if array.shape[2] < channels:
        return np.repeat(array, channels, axis=2)
    if array.shape[2] > channels:
        if (array != array[..., :1]).any():
            raise Unreadable("colour, and the model takes grey")
        array = array[..., :1]
    return np.array(array, order="C")
