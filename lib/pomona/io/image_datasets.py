"""Images in datasets of the library `datasets`: saved to a directory, or of the hub. They are not decoded by it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from pomona.errors import MissingError
from pomona.io.image_folders import digest_of
from pomona.io.image_options import ImageOptions
from pomona.io.image_tables import named_files, picture_of
from pomona.io.picture import Picture
from pomona.io.records import Located, Reject

_ROWS = 16  # read at a time: images are large


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved something there."""
    one = (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


class Saved:
    """A directory that `datasets` saved; the splits of one that has several are its images' splits.

    Raises:
        MissingError: it is damaged.
    """

    skipped = 0

    def __init__(self, name: str, options: ImageOptions) -> None:
        from datasets import DatasetDict, load_from_disk

        self._path, self._options = Path(name), options
        try:
            data = load_from_disk(name)
        except Exception as error:
            raise MissingError(f"{name}: not a readable dataset: {str(error).splitlines()[0]}") from error
        self._splits: Mapping[str | None, Any] = data if isinstance(data, DatasetDict) else {None: data}
        self.count: int | None = sum(map(len, self._splits.values()))

    def __iter__(self) -> Iterator[Picture | Reject]:
        for split, data in self._splits.items():
            inside = f"/{split}" if split is not None else ""
            yield from _pictures(
                data, self._options, f"{self._path}{inside}", name=f"{self._path.name}{inside}", split=split
            )

    def sources(self, limit: int | None) -> list[dict[str, Any]]:
        files = sorted(path for path in self._path.rglob("*") if path.suffix == ".arrow" or path.stem == "dataset_info")
        saved = digest_of(self._path.resolve().name, ((str(path.relative_to(self._path)), path) for path in files))
        return [saved, *named_files(islice(self, limit), f"images that {saved['name']} names")]


class Hub:
    """``hf:NAME[:SPLIT]``, read as it streams in; the split is train, and the images' own only where it is given.

    Raises:
        MissingError: there is no such dataset, or no network to it.
    """

    count: int | None = None
    skipped = 0

    def __init__(self, name: str, options: ImageOptions) -> None:
        self._name, self._options = name, options
        self._identifier, _, self._split = name.removeprefix("hf:").partition(":")
        self._data = self._loaded()

    def _loaded(self) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(self._identifier, split=self._split or "train", streaming=True)
        except Exception as error:
            raise MissingError(
                f"{self._name}: cannot be loaded: {str(error).splitlines()[0]}",
                hint="without a network, give files or a saved dataset",
            ) from error

    def __iter__(self) -> Iterator[Picture | Reject]:
        return _pictures(self._data, self._options, self._name, name=self._name, split=self._split or None)

    def sources(self, limit: int | None) -> list[dict[str, Any]]:
        """One entry, over what the records say and hold, as the files are the hub's own business."""
        sha256, total = hashlib.sha256(), 0
        for item in islice(self, limit):
            if isinstance(item, Picture):
                content = item.content if isinstance(item.content, bytes) else b""
                said = orjson.dumps([item.id, item.label, item.split, item.fields])
                sha256.update(said + hashlib.sha256(content).digest())
                total += len(content)
        entry = {"name": self._name, "bytes": total, "sha256": sha256.hexdigest()}
        return [entry, *named_files(islice(self, limit), f"images that {self._name} names")]


def _pictures(
    data: Any, options: ImageOptions, source: str, *, name: str, split: str | None
) -> Iterator[Picture | Reject]:
    names = getattr((data.features or {}).get(options.label_field), "names", None)
    number = 0
    # As Arrow keeps them, images are bytes or paths; read in any other way `datasets` decodes them.
    for batch in data.with_format("arrow").iter(batch_size=_ROWS):
        for record in batch.to_pylist():
            number += 1
            label = record.get(options.label_field)
            if names is not None and isinstance(label, int):
                record[options.label_field] = names[label] if 0 <= label < len(names) else None
            yield picture_of(Located(record, source, number), options, folder=Path(), name=name, split=split)
