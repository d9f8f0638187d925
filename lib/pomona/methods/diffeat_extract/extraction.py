"""Features of images, shard by shard: decode, add keyed noise, run the part of the model that is used, pool.

Section 3 of the paper. A batch is planned from the order of the images alone and computed by one thread from beginning
to end, so that threads and processes change nothing; a shard is written while the next one is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from pomona.errors import CheckFailed
from pomona.io.images import Picture
from pomona.io.pixels import Unreadable, cropped, pixels
from pomona.io.records import Reject
from pomona.io.rejects import reject, unreadable
from pomona.io.shards import Shards
from pomona.methods.diffeat_extract.noising import Schedule, noise, noised
from pomona.methods.diffeat_extract.reading import PIXELS, Reading, column_name
from pomona.models.unets.loading import UNet
from pomona.models.unets.truncated import Truncated
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Progress
from pomona.runtime.seeds import derive

_DECODERS = 8  # threads that decode for an accelerator


@dataclass(frozen=True)
class Read:
    """What came of one batch.

    Attributes:
        kept: places in the batch of the images that could be read.
        vectors: by column, (kept x views, dims): the views of an image follow one another.
        unreadable: place and reason of each of the others.
    """

    kept: list[int]
    vectors: dict[str, NDArray[Any]]
    unreadable: list[tuple[int, str]]


@dataclass(frozen=True)
class Group:
    """One shard's worth of images, read.

    Attributes:
        rows: what is known of each row besides its features.
        rejects: source, line and reason of each image that could not be read.
    """

    index: int
    images: int
    rows: list[dict[str, Any]]
    vectors: dict[str, NDArray[Any]]
    rejects: list[dict[str, Any]]


class FeatureReader:
    """The features of a batch of pictures: one `Reading` of one model."""

    def __init__(
        self,
        unet: UNet,
        reading: Reading,
        schedule: Schedule,
        runtime: Runtime,
        *,
        seed: int,
        rows: int,
        compiled: bool,
    ) -> None:
        """
        Args:
            rows: passes through the model in one batch at most.
            compiled: whether to compile the part of the model that is used.
        """
        self._channels = unet.channels
        self._reading, self._runtime, self._seed, self._rows = reading, runtime, seed, rows
        self._schedule = schedule
        truncated: Any = Truncated(unet.module, [block.number for block in reading.blocks]).eval()
        self._pass = torch.compile(truncated, dynamic=False) if compiled else truncated
        self._padded = compiled  # one shape, one graph
        self.columns = reading.columns()
        self.pictures = max(1, rows // reading.rows)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Picture]) -> Read:
        kept, views, unreadable = _decoded(
            pictures, self._views, threads=_DECODERS if self._runtime.device.type != "cpu" else 1
        )
        vectors: dict[str, NDArray[np.float32]] = {}
        if kept:
            named = [(pictures[place].id, view) for place in kept for view in range(self._reading.views)]
            vectors = self._features(as_input(np.concatenate(views)), named)
        for column, found in vectors.items():
            finite = np.isfinite(found).all(axis=1)
            if not finite.all():
                name = pictures[kept[int(finite.argmin()) // self._reading.views]].id
                raise CheckFailed(
                    f"the features {column} of {name} are not finite", hint="--dtype float32 has the widest range"
                )
        return Read(kept, vectors, unreadable)

    def _views(self, picture: Picture) -> NDArray[np.uint8]:
        """(views, size, size, channels)."""
        size, channels = self._reading.size, self._channels
        found = [pixels(picture.content, channels=channels, size=size)]
        for view in range(1, self._reading.views):
            seed = derive(self._seed, f"view/{view}/{picture.id}")
            mirror = self._reading.mirror
            found.append(cropped(picture.content, channels=channels, size=size, seed=seed, mirror=mirror))
        return np.stack(found)

    def _features(self, images: Tensor, named: Sequence[tuple[str, int]]) -> dict[str, NDArray[np.float32]]:
        """By column, for images (rows, C, H, W) in [-1, 1] with the name and the view of each."""
        reading = self._reading
        noisy_images = torch.stack(
            [
                noisy(image, self._schedule, seed=self._seed, name=name, timestep=timestep, view=view, draw=draw)
                for timestep in reading.timesteps
                for draw in range(reading.draws)
                for image, (name, view) in zip(images, named, strict=True)
            ]
        )
        times = torch.tensor(reading.timesteps).repeat_interleave(reading.draws * len(named))
        pooled: dict[tuple[str, int], list[Tensor]] = {}
        for part, at in zip(torch.split(noisy_images, self._rows), torch.split(times, self._rows), strict=True):
            for block, maps in zip(reading.blocks, self._maps(part, at), strict=True):
                for pool in reading.pools:
                    if pool <= block.side:
                        cells = adaptive_avg_pool2d(maps.float(), pool).flatten(1).cpu()
                        pooled.setdefault((block.name, pool), []).append(cells)
        found = {}
        for (block_name, pool), parts in pooled.items():
            each = torch.cat(parts).reshape(len(reading.timesteps), reading.draws, len(named), -1).mean(1)
            for timestep, cells in zip(reading.timesteps, each, strict=True):
                found[column_name(timestep, block_name, pool)] = cells.contiguous().numpy()
        return {column.name: found[column.name] for column in self.columns}

    def _maps(self, images: Tensor, times: Tensor) -> tuple[Tensor, ...]:
        short = self._rows - len(images) if self._padded else 0
        if short:
            images = torch.cat([images, images[-1:].expand(short, -1, -1, -1)])
            times = torch.cat([times, times[-1:].expand(short)])
        device, dtype = self._runtime.device, self._runtime.dtype
        found: tuple[Tensor, ...] = self._pass(images.to(device, dtype), times.to(device))
        return tuple(maps[: len(maps) - short] for maps in found)


def as_input(images: NDArray[np.uint8]) -> Tensor:
    """Images (n, H, W, C) as a model gets them: (n, C, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def noisy(
    image: Tensor, schedule: Schedule, *, seed: int, name: str, timestep: int, view: int = 0, draw: int = 0
) -> Tensor:
    """x_t of one image (C, H, W) in [-1, 1]."""
    eps = noise(seed, name, timestep, view, draw, tuple(image.shape))
    return noised(image, schedule.alpha_bars[timestep], eps)


class ImageReader:
    """The middle crops as they are: one column, ``images``, (images, size x size x channels) of whole numbers."""

    pictures = 256

    def __init__(self, channels: int, size: int) -> None:
        self._channels, self._size = channels, size

    def __call__(self, pictures: Sequence[Picture]) -> Read:
        kept, images, unreadable = _decoded(
            pictures, lambda picture: pixels(picture.content, channels=self._channels, size=self._size), threads=1
        )
        return Read(kept, {"images": np.stack(images).reshape(len(kept), -1)} if kept else {}, unreadable)


class PixelReader(ImageReader):
    """The control that needs no model: pixels of the middle crop, averaged to at most 32 x 32, in [0, 1]."""

    def __call__(self, pictures: Sequence[Picture]) -> Read:
        read = super().__call__(pictures)
        if not read.kept:
            return read
        images = read.vectors["images"].reshape(-1, self._size, self._size, self._channels)
        stacked = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 255
        small = adaptive_avg_pool2d(stacked, min(self._size, PIXELS)).flatten(1)
        return Read(read.kept, {"pixels": small.numpy()}, read.unreadable)


def _decoded(
    pictures: Sequence[Picture], decode: Callable[[Picture], NDArray[np.uint8]], *, threads: int
) -> tuple[list[int], list[NDArray[np.uint8]], list[tuple[int, str]]]:
    """Places of the pictures that could be read, their pixels, and places and reasons of the others."""

    def attempt(picture: Picture) -> NDArray[np.uint8] | str:
        try:
            return decode(picture)
        except Unreadable as error:
            return str(error)

    if threads == 1:
        found = [attempt(picture) for picture in pictures]
    else:
        with ThreadPoolExecutor(threads) as pool:  # Pillow decodes without the interpreter's lock
            found = list(pool.map(attempt, pictures))
    kept = [place for place, what in enumerate(found) if not isinstance(what, str)]
    return (
        kept,
        [what for what in found if not isinstance(what, str)],
        [(place, what) for place, what in enumerate(found) if isinstance(what, str)],
    )


def groups(
    images: Iterable[Picture | Reject],
    task: str,
    runtime: Runtime,
    *,
    size: int,
    pictures: int,
    views: int,
    tolerant: bool,
    skip: Callable[[int], bool],
) -> Iterator[Group]:
    """The images in groups of `size`, each read by the task of that name which `runtime` knows.

    Args:
        pictures: in one batch.
        tolerant: unreadable images are set aside; otherwise the first stops the run.
        skip: whether the group of that number is there already.

    Raises:
        DataError: an image cannot be read, unless `tolerant`.
    """
    source = iter(images)
    index = 0
    while items := list(islice(source, size)):
        if not skip(index):
            yield _group(index, items, task, runtime, pictures, views, tolerant)
        index += 1


def _group(
    index: int,
    items: Sequence[Picture | Reject],
    task: str,
    runtime: Runtime,
    pictures: int,
    views: int,
    tolerant: bool,
) -> Group:
    good = [item for item in items if isinstance(item, Picture)]
    batches = [good[start : start + pictures] for start in range(0, len(good), pictures)]
    results = runtime.map(task, batches)
    rows: list[dict[str, Any]] = []
    bad = [reject(item, item.reason) for item in items if isinstance(item, Reject)]
    for batch, read in zip(batches, results, strict=True):
        rows += [row for place in read.kept for row in _rows(batch[place], views)]
        for place, reason in read.unreadable:
            bad.append(reject(batch[place], reason))
    bad.sort(key=lambda entry: entry["line"])
    if bad and not tolerant:
        raise unreadable(bad[0])
    names = next((list(read.vectors) for read in results if read.kept), [])
    vectors = {name: np.concatenate([read.vectors[name] for read in results if read.kept]) for name in names}
    return Group(index, len(items), rows, vectors, bad)


def _rows(picture: Picture, views: int) -> list[dict[str, Any]]:
    row: dict[str, Any] = {"id": picture.id}
    if picture.label is not None:
        row["label"] = picture.label
    if picture.split is not None:
        row["split"] = picture.split
    row.update(picture.fields)
    return [row] if views == 1 else [{**row, "view": view} for view in range(views)]


def keep(found: Iterable[Group], shards: Shards, progress: Progress) -> None:
    """Write each group as a shard, while the next one is computed."""
    with ThreadPoolExecutor(1) as writer:
        pending = None
        for group in found:
            if pending is not None:
                pending.result()
            pending = writer.submit(shards.write, group.index, group.rows, group.vectors, group.rejects)
            progress.advance(group.images)
        if pending is not None:
            pending.result()
