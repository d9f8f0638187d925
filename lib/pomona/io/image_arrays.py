"""Images that are arrays of pixels: scikit-learn's digits, and NumPy's ``.npz``."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomona.errors import DataError, MissingError
from pomona.io.image_options import ImageOptions
from pomona.io.labelled import label_of
from pomona.io.manifest import file_digest
from pomona.io.picture import Picture, Split

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

DIGITS = "builtin:digits"

_SPLITS: tuple[tuple[Split, tuple[str, ...]], ...] = (
    ("train", ("train",)),
    ("validation", ("validation", "valid", "val")),
    ("test", ("test",)),
)


class Digits:
    """The 1,797 grey 8x8 digits of scikit-learn, in their order, half of them to train on."""

    count: int | None = 1797
    skipped = 0

    def sources(self, limit: int | None) -> list[dict[str, Any]]:
        images, labels = _digits()
        data = images.tobytes() + labels.tobytes()
        return [{"name": DIGITS, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}]

    def __iter__(self) -> Iterator[Picture]:
        import numpy as np

        images, labels = _digits()
        train = set(np.random.default_rng(0).permutation(len(images))[: len(images) // 2].tolist())
        for place, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            split: Split = "train" if place in train else "test"
            yield Picture(f"digit-{place:04d}", label, split, {}, DIGITS, place + 1, image)


def _digits() -> tuple[NDArray[uint8], NDArray[uint8]]:
    """Images (1797, 8, 8), scaled from 0..16 to 0..255, and labels (1797,)."""
    import numpy as np
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8), labels.astype(np.uint8)


@dataclass(frozen=True)
class _Part:
    """The names of the arrays of one split."""

    split: Split | None
    images: str
    labels: str | None
    count: int


class Arrays:
    """An ``.npz`` with images (N, H, W) or (N, H, W, C), C 1, 3 or 4, and labels (N,) or (N, 1) or none.

    The arrays are called ``images`` and ``labels``, ``x`` and ``y``, as the options say, or by splits:
    ``x_train`` and ``y_train``, ``train_images`` and ``train_labels``, and so for val and test. Those of a split are in
    memory together.

    Raises:
        MissingError: the file cannot be read.
        DataError: it is damaged, holds a pickle, or arrays of other names, shapes or numbers.
    """

    skipped = 0

    def __init__(self, name: str, options: ImageOptions) -> None:
        self._path = Path(name)
        self._parts = self._found(self._headers(), options)
        self.count: int | None = sum(part.count for part in self._parts)

    def sources(self, limit: int | None) -> list[dict[str, Any]]:
        return [{"name": self._path.name, **file_digest(self._path)}]

    def __iter__(self) -> Iterator[Picture]:
        for part in self._parts:
            images = self._images(part.images)
            labels = self._labels(part.labels, part.count)
            for place in range(part.count):
                yield Picture(
                    f"{self._path.name}:{part.images}[{place}]",
                    labels[place],
                    part.split,
                    {},
                    f"{self._path}:{part.images}",
                    place + 1,
                    images[place],
                )

    def _headers(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and number format of each array, without reading it."""
        from numpy.lib import format as npy

        found = {}
        try:
            with zipfile.ZipFile(self._path) as archive:
                for member in archive.namelist():
                    if member.endswith(".npy"):
                        with archive.open(member) as file:
                            version = npy.read_magic(file)
                            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                            shape, _, dtype = read(file)
                        found[member.removesuffix(".npy")] = (shape, dtype)
        except OSError as error:
            raise MissingError(f"{self._path}: {(error.strerror or str(error)).lower()}") from error
        except Exception as error:  # zipfile and NumPy raise all sorts for damaged files
            raise DataError(f"{self._path}: not a readable .npz: {str(error).splitlines()[0]:.100}") from error
        return found

    def _found(self, headers: dict[str, tuple[tuple[int, ...], Any]], options: ImageOptions) -> list[_Part]:
        pairs: list[tuple[Split | None, str, str]] = [
            (None, options.image_field, options.label_field),
            (None, "images", "labels"),
            (None, "x", "y"),
        ]
        for own, names in _SPLITS:
            for name in names:
                pairs += [(own, f"x_{name}", f"y_{name}"), (own, f"{name}_images", f"{name}_labels")]
        there = [pair for pair in pairs if pair[1] in headers]
        for place, option in ((1, "image_field"), (2, "label_field")):
            asked = getattr(options, option)
            if asked != getattr(ImageOptions, option) and asked not in [pair[place] for pair in there]:
                missing = "is missing" if asked not in headers else "belongs to no images"
                raise DataError(
                    f'{self._path}: array "{asked}" {missing} (use --{option.replace("_", "-")});'
                    f" there are {', '.join(headers):.100}"
                )
        if there and there[0][0] is None:
            there = there[:1]
        if not there:
            raise DataError(
                f"{self._path}: no array of images, only {', '.join(headers) or 'none'}",
                hint="name it images, x or x_train, or say which with --image-field and --label-field",
            )
        parts = []
        for split, images, labels in there:
            shape, dtype = headers[images]
            self._check(images, shape, dtype)
            given = labels in headers
            if given:
                self._check_labels(labels, *headers[labels], count=shape[0])
            elif labels == options.label_field != "label":
                raise DataError(f'{self._path}: array "{labels}" is missing (use --label-field)')
            parts.append(_Part(split, images, labels if given else None, shape[0]))
        return parts

    def _check(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        if dtype.kind == "O":
            raise DataError(f"{self._path}: {name} holds Python objects, a pickle, which is never loaded")
        if dtype.kind not in "biu":
            raise DataError(
                f"{self._path}: {name} holds {dtype}; images are uint8, 0 to 255",
                hint="from 0..1: (x * 255).round().astype('uint8')",
            )
        if len(shape) not in (3, 4) or 0 in shape[1:] or (len(shape) == 4 and shape[3] not in (1, 3, 4)):
            hint = "x.transpose(0, 2, 3, 1) puts the channels last" if shape[1:2] in ((1,), (3,)) else None
            raise DataError(
                f"{self._path}: {name} is {shape}; images are (N, height, width) or (N, height, width, 1, 3 or 4)",
                hint=hint,
            )

    def _check_labels(self, name: str, shape: tuple[int, ...], dtype: Any, *, count: int) -> None:
        if dtype.kind == "O":
            raise DataError(f"{self._path}: {name} holds Python objects, a pickle, which is never loaded")
        if shape not in ((count,), (count, 1)):
            hint = "of one-hot rows, y.argmax(1) gives the labels" if len(shape) == 2 else None
            raise DataError(f"{self._path}: {name} is {shape} for {count} images", hint=hint)

    def _load(self, name: str) -> NDArray[Any]:
        import numpy as np

        try:
            with np.load(self._path, allow_pickle=False) as archive:
                loaded: NDArray[Any] = archive[name]
        except OSError as error:
            raise MissingError(f"{self._path}: {(error.strerror or str(error)).lower()}") from error
        except Exception as error:  # zipfile, zlib and NumPy raise all sorts for damaged files
            raise DataError(f"{self._path}: {name} is damaged: {str(error).splitlines()[0]:.100}") from error
        return loaded

    def _images(self, name: str) -> NDArray[uint8]:
        import numpy as np

        images = self._load(name)
        if images.dtype == bool:
            return images.astype(np.uint8) * np.uint8(255)
        if images.dtype != np.uint8 and images.size and not 0 <= images.min() <= images.max() <= 255:
            raise DataError(f"{self._path}: {name} goes from {images.min()} to {images.max()}; images are 0 to 255")
        return images.astype(np.uint8, copy=False)

    def _labels(self, name: str | None, count: int) -> list[Any]:
        if name is None:
            return [None] * count
        values = self._load(name).reshape(-1).tolist()
        try:
            return [label_of(value.decode() if isinstance(value, bytes) else value) for value in values]
        except ValueError as error:
            raise DataError(f"{self._path}: {name} {error}") from error
