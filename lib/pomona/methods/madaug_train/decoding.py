"""Images from any input, decoded in order into one file of pixels, some megabytes at a time."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pomona.errors import DataError
from pomona.io.picture import Picture
from pomona.io.pixels import Unreadable, pixels
from pomona.io.rejects import reject, unreadable
from pomona.runtime.progress import Progress

Pixels = NDArray[np.uint8]

_CHUNK_BYTES, _CHUNK = 16 << 20, 512  # pixels, and images, that are decoded before they are written
_DIGEST = 16  # bytes, which no two of a billion images share by chance

HEADER = 128
"""Bytes before the pixels, whatever the number of images turns out to be."""


@dataclass
class Decoded:
    """What came of the images.

    Attributes:
        kept: places among all of those that could be read.
        contents: of each of these the place, among these, of the first that has the same pixels.
        rejects: what is kept of the others.
        shape: (N, C, H, W).
        sha256: of all pixels as they are written.
    """

    kept: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    sha256: str = ""


def decode(
    pictures: Iterable[Picture], file: BinaryIO, *, size: int | None, tolerant: bool, progress: Progress
) -> Decoded:
    """Write the pixels of `pictures`, which are gone through twice at most, as ``.npy``: (N, C, H, W).

    C is 1 where every image is grey, be it in three equal channels, and 3 otherwise, with grey ones repeated.

    Args:
        size: the short side is scaled to it, and the middle cropped; None leaves sizes alone.
        tolerant: unreadable images are set aside; otherwise the first stops the run.

    Raises:
        DataError: an image cannot be read, unless `tolerant`; or it has another size than the first.
        UnavailableError: Pillow is not installed, and something is to be decoded or scaled.
    """
    found = _written(pictures, file, 1, size, tolerant, progress)
    if found is None:
        file.seek(0)  # what is written now is longer
        found = _written(pictures, file, 3, size, tolerant, progress)
        assert found is not None, "three channels hold any image"
    return found


def _written(
    pictures: Iterable[Picture], file: BinaryIO, channels: int, size: int | None, tolerant: bool, progress: Progress
) -> Decoded | None:
    """None where an image has colour, and grey ones are in the file already with one channel."""
    found, digests, sha256 = Decoded(), bytearray(), hashlib.sha256()
    begin = 0
    shape: tuple[int, ...] = ()
    file.write(bytes(HEADER))
    with _Decoder(size) as decoder:
        for chunk in decoder.chunks(pictures):
            images = []
            for place, (picture, image) in enumerate(chunk, begin):
                if isinstance(image, str):
                    found.rejects.append(reject(picture, image))
                    if not tolerant:
                        raise unreadable(found.rejects[0])
                else:
                    images.append(image)
                    found.kept.append(place)
            begin += len(chunk)
            progress.advance(len(chunk))
            if channels == 1 and any(image.shape[2] == 3 for image in images):
                if len(found.kept) > len(images):
                    return None
                channels = 3
            for image in images:
                # in its own channels, so that it does not matter what kind of file it was in
                digests += hashlib.blake2b(image.data, digest_size=_DIGEST).digest()
                shape = image.shape[:2]
            if images:
                stacked = np.stack([np.broadcast_to(image, (*shape, channels)) for image in images])
                planes = stacked.transpose(0, 3, 1, 2).tobytes()
                sha256.update(planes)
                file.write(planes)
    found.shape = (len(found.kept), channels, *shape)
    found.contents, found.sha256 = _firsts(digests), sha256.hexdigest()
    file.seek(0)
    file.write(_header(found.shape))
    return found


class _Decoder:
    """Pixels of images that all have the size of the first, several at a time; a context manager."""

    def __init__(self, size: int | None) -> None:
        self._size = size
        self._first: tuple[str, tuple[int, int]] | None = None
        self._threads = min(8, os.cpu_count() or 1)

    def __enter__(self) -> _Decoder:
        self._pool = ThreadPoolExecutor(self._threads)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def chunks(self, pictures: Iterable[Picture]) -> Iterator[list[tuple[Picture, Pixels | str]]]:
        """The pictures in their order, each with its pixels (H, W, 1 or 3), or why there are none."""
        source = iter(pictures)
        most = 1
        while some := list(islice(source, most)):
            yield list(zip(some, self._decoded(some), strict=True))
            if self._first is not None:
                height, width = self._first[1]
                most = max(self._threads, min(_CHUNK, _CHUNK_BYTES // (3 * height * width)))

    def _decoded(self, pictures: Sequence[Picture]) -> list[Pixels | str]:
        if isinstance(pictures[0].content, np.ndarray) or len(pictures) == 1:
            return self._some(pictures)
        step = -(-len(pictures) // (4 * self._threads))
        parts = [pictures[start : start + step] for start in range(0, len(pictures), step)]
        return [image for part in self._pool.map(self._some, parts) for image in part]  # Pillow lets go of the lock

    def _some(self, pictures: Sequence[Picture]) -> list[Pixels | str]:
        return [self._one(picture) for picture in pictures]

    def _one(self, picture: Picture) -> Pixels | str:
        content = picture.content
        grey = isinstance(content, np.ndarray) and (content.ndim == 2 or content.shape[2] == 1)
        try:
            image = pixels(content, channels=1 if grey else 3, size=self._size)
        except Unreadable as error:
            return str(error)
        if self._first is None:
            self._first = picture.id, image.shape[:2]
        name, wanted = self._first
        if image.shape[:2] != wanted:
            (high, wide), (height, width) = image.shape[:2], wanted
            raise DataError(
                f"{picture.id:.80} has {wide} x {high} pixels, and {name:.80} has {width} x {height}",
                hint=f"--image-size {min(high, wide, height, width)} scales all alike and crops the middle",
            )
        if image.shape[2] == 3 and (image[..., 0] == image[..., 1]).all() and (image[..., 0] == image[..., 2]).all():
            return np.ascontiguousarray(image[..., :1])
        return image


def _header(shape: tuple[int, ...]) -> bytes:
    """The beginning of an ``.npy`` of uint8 of this shape."""
    written = io.BytesIO()
    npy.write_array_header_1_0(written, {"descr": "|u1", "fortran_order": False, "shape": shape})
    header = written.getvalue()
    assert len(header) == HEADER, "numpy leaves room for as many images as there may be"
    return header


def _firsts(digests: bytearray) -> list[int]:
    """Of each digest the place of the first that is equal."""
    _, firsts, group = np.unique(np.frombuffer(digests, dtype=f"S{_DIGEST}"), return_index=True, return_inverse=True)
    found: list[int] = firsts[group].tolist()
    return found
