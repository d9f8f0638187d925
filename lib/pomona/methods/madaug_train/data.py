"""The images of a run: decoded once into one array on disk, which every training then maps into its memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from pomona.errors import DataError, MissingError
from pomona.io.atomic import atomic_file, writing
from pomona.io.image_arrays import DIGITS
from pomona.io.image_options import ImageOptions
from pomona.io.images import Images, Picture, Reject
from pomona.io.labelled import ordered
from pomona.io.rejects import none_readable, reject, unreadable
from pomona.methods.madaug_train.config import Config, SplitOptions
from pomona.methods.madaug_train.decoding import HEADER, decode
from pomona.methods.madaug_train.splits import Listed, drawn
from pomona.runtime.progress import Progress
from pomona.runtime.settings import Settings

_IMAGES, _ABOUT = "images.npy", "data.json"
_DECISIVE = ("names", "labels", "ids", "splits", "contents", "options", "pixels", "shape")
_SPLIT = {"val": "validation", "test": "test"}
_DIGITS_IMAGES = 200  # to learn from, and to learn the policy on


@dataclass(frozen=True, kw_only=True)
class Prepared(Listed):
    """The images of a run, decoded, in the order of the inputs: DATA, ``--val``, ``--test``.

    Attributes:
        folder: where they are kept.
        images: (N, C, H, W), C 1 or 3, mapped from disk, read-only.
        options: how they are to be parted; what is particular to the digits is settled.
        digest: SHA-256 of the pixels and of all that is said here.
    """

    folder: Path
    images: NDArray[np.uint8]
    options: SplitOptions
    digest: str


class Inputs:
    """Everything that a run reads images from; names and labels are known before any pixel is read.

    Raises:
        MissingError: an input does not exist or cannot be read.
        DataError: an input is damaged as a whole.
    """

    def __init__(self, config: Config, settings: Settings, names: Sequence[str]) -> None:
        """
        Args:
            names: the inputs of the images to learn from; none is ``builtin:digits``. ``--limit`` is for each of these,
                ``--val`` and ``--test`` by itself.
        """
        self._config, self._seed = config, settings.seed
        self.options = _settled(config, names)
        asked = {field.name: getattr(config, field.name) for field in fields(ImageOptions) if field.name != "rejects"}
        self._decisive = {**asked, "limit": settings.limit}
        self._read = {"data": Images(names, config, limit=settings.limit)}
        for part in ("val", "test"):
            if (name := getattr(config, part)) is not None:
                self._read[part] = Images([name], config, limit=settings.limit)

    @cached_property
    def sources(self) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of what decides the result, and what each is for where that is not to learn from."""
        return [
            ({} if part == "data" else {"for": part}) | entry
            for part, images in self._read.items()
            for entry in images.sources
        ]

    @cached_property
    def _listed(self) -> tuple[Listed, list[dict[str, Any]]]:
        """All images as if none had the pixels of another, and records that are none."""
        ids: list[str] = []
        labels: list[str] = []
        splits: list[str | None] = []
        rejects = []
        for part, images in self._read.items():
            own: list[str | None] = []
            for item in images:
                if isinstance(item, Reject):
                    rejects.append(reject(item, item.reason))
                    if self._config.rejects is None:
                        raise unreadable(rejects[0])
                    continue
                if item.label is None:
                    raise DataError(
                        f"{item.source}: the images have no labels, so there is nothing to learn",
                        hint="--label-field names the field; in a folder of folders the folder's name is the label",
                    )
                ids.append(item.id)
                labels.append(str(item.label))
                own.append(item.split)
            splits += self._roles(own, ids[len(splits) :]) if part == "data" else [_SPLIT[part]] * len(own)
        if not ids:
            raise none_readable(self._config.rejects, rejects)
        names = ordered(set(labels))
        place = {name: number for number, name in enumerate(names)}
        numbered = np.array([place[label] for label in labels], dtype=np.int64)
        return Listed(labels=numbered, names=names, ids=ids, splits=splits, contents=np.arange(len(ids))), rejects

    def _roles(self, splits: Sequence[str | None], ids: Sequence[str]) -> list[str | None]:
        """What images of DATA are for, whose own splits these are; data of one part alone is parted anew."""
        there = set(splits)
        if self.options.resplit or len(there) < 2:
            return ["train"] * len(splits)
        if None in there:
            raise DataError(
                f"{ids[splits.index(None)]:.80} belongs to no split, while others do",
                hint='give every image "train", "validation" or "test", or part all anew by --resplit',
            )
        replaced = {_SPLIT[part] for part in self._read if part != "data"}
        return [None if split in replaced else split for split in splits]

    def foretold(self) -> dict[str, Any]:
        """What would be read and how it would be parted under the first seed, from names and labels alone.

        Raises:
            DataError: as `prepare`.
        """
        listed, rejects = self._listed
        found = drawn(listed, self.options, seed=self._seed)
        counts = {
            part: np.bincount(listed.labels[getattr(found, part)], minlength=len(listed.names)).tolist()
            for part in ("train", "val", "test")
        }
        return {
            "images": len(listed.ids) + len(rejects),
            **{part: sum(numbers) for part, numbers in counts.items()},
            "unused": found.unused,
            "rejected": len(rejects),
            "classes": {
                name: {part: counts[part][place] for part in counts} for place, name in enumerate(listed.names)
            },
        }

    def prepare(self, folder: Path, progress: Progress) -> tuple[Prepared, list[dict[str, Any]]]:
        """Decode all images into `folder`, which exists; returns them, and what is kept of those that cannot be read.

        What cannot be parted as it should be is refused before any pixel is read. Memory is bounded by some megabytes
        of pixels, and what is known of each image besides. A folder in which the same images are prepared is left as it
        is; anything else in it of these names is replaced.

        Raises:
            DataError: an image cannot be read, unless ``--rejects`` sets it aside; it has another size than the first;
                labels are missing, or the images cannot be parted (`splits.drawn`).
            OutputError: the disk is full.
            UnavailableError: Pillow is not installed, and something is to be decoded or scaled.
        """
        listed, rejects = self._listed
        drawn(listed, self.options, seed=self._seed)
        made_from = {"sources": self.sources, **self._decisive, "options": asdict(self.options)}
        about = _about(folder)
        if about is None or about.get("made_from") != made_from:
            progress.start("reading images", len(listed.ids))
            with atomic_file(folder / _IMAGES) as file, writing(folder / _IMAGES):
                decoded = decode(
                    _Pictures(self._read.values()),
                    file,
                    size=self._config.image_size,
                    tolerant=self._config.rejects is not None,
                    progress=progress,
                )
                rejects = [*rejects, *decoded.rejects]
                if not decoded.kept:
                    raise none_readable(self._config.rejects, rejects)
            about = {
                "names": listed.names,
                "labels": listed.labels[decoded.kept].tolist(),
                "ids": [listed.ids[place] for place in decoded.kept],
                "splits": [listed.splits[place] for place in decoded.kept],
                "contents": decoded.contents,
                "options": asdict(self.options),
                "pixels": decoded.sha256,
                "shape": decoded.shape,
            }
            about |= {"digest": _digest(about), "made_from": made_from, "rejects": rejects}
            with atomic_file(folder / _ABOUT) as file, writing(folder / _ABOUT):
                file.write(orjson.dumps(about))
        elif about["rejects"] and self._config.rejects is None:
            raise unreadable(about["rejects"][0])
        prepared = open_prepared(folder)
        drawn(prepared, self.options, seed=self._seed)
        _warn(prepared, progress)
        return prepared, about["rejects"]


@dataclass(frozen=True)
class _Pictures:
    """The images of all inputs, to be gone through again and again."""

    inputs: Iterable[Images]

    def __iter__(self) -> Iterator[Picture]:
        return (item for images in self.inputs for item in images if isinstance(item, Picture))


def open_prepared(folder: Path) -> Prepared:
    """What was prepared in `folder`, in another process.

    Raises:
        MissingError: it is not there, or not what was written.
    """
    about = _about(folder)
    if about is None:
        raise MissingError(f"{folder}: the prepared images are missing or damaged", hint="--overwrite begins again")
    return Prepared(
        labels=np.array(about["labels"], dtype=np.int64),
        names=about["names"],
        ids=about["ids"],
        splits=about["splits"],
        contents=np.array(about["contents"], dtype=np.int64),
        folder=folder,
        images=np.load(folder / _IMAGES, mmap_mode="r"),
        options=SplitOptions(**about["options"]),
        digest=about["digest"],
    )


def _about(folder: Path) -> dict[str, Any] | None:
    """What is known of the images in `folder`; None where they are not all there, or not as they were written."""
    try:
        about: dict[str, Any] = orjson.loads((folder / _ABOUT).read_bytes())
        images = np.load(folder / _IMAGES, mmap_mode="r")
        whole = about["digest"] == _digest(about) and about["shape"] == list(images.shape)
        with (folder / _IMAGES).open("rb") as file:  # pages that are mapped would count as memory
            file.seek(HEADER)
            whole = whole and about["pixels"] == hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, EOFError, ValueError, LookupError, TypeError):
        return None
    return about if whole else None


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps([about[name] for name in _DECISIVE])).hexdigest()


def _warn(prepared: Prepared, progress: Progress) -> None:
    """Tell of what may be right and is worth a look."""
    labels, contents = prepared.labels, prepared.contents
    twins = int((contents != np.arange(len(contents))).sum())
    if twins:
        unlike = int((labels != labels[contents]).sum())
        told = f"; {unlike:,} of them under another label" if unlike else ""
        progress.warn(f"{twins:,} images have the same pixels as one before them{told}")
    splits = np.array([split or "" for split in prepared.splits])
    for split in ("validation", "test"):
        lacking = np.setdiff1d(np.arange(len(prepared.names)), labels[splits == split])
        if 0 < len(lacking) < len(prepared.names):
            also = f" and {len(lacking) - 1:,} others" if len(lacking) > 1 else ""
            progress.warn(f'no {split} image is labelled "{prepared.names[lacking[0]]:.40}"{also}')


def _settled(config: Config, names: Sequence[str]) -> SplitOptions:
    """How the images are to be parted; the digits alone by number, and anew for every seed, unless told otherwise."""
    options = SplitOptions(**{field.name: getattr(config, field.name) for field in fields(SplitOptions)})
    alone = config.val is None and config.test is None and list(names) in ([], [DIGITS])
    if not alone:
        return options
    options = replace(options, resplit=True)
    if options.test_fraction != SplitOptions.test_fraction or options.val_fraction != SplitOptions.val_fraction:
        return options
    return replace(
        options,
        train_images=options.train_images or _DIGITS_IMAGES,
        val_images=options.val_images or _DIGITS_IMAGES,
    )
