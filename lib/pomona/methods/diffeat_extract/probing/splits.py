"""Which images a probe learns from, and which it is tested on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pomona.errors import DataError
from pomona.io.labelled import ordered
from pomona.runtime.seeds import derive

Places = NDArray[np.int64]

_VALIDATION_SHARE = 0.5
"""Of the images to learn from: a choice among a hundred settings is worth no more than the images it was made on."""


@dataclass(frozen=True)
class Task:
    """Images with labels, parted in two.

    Attributes:
        names: the labels in order: by value where all are whole numbers, else by their characters.
        labels: of every image, as places in `names`; of images in neither part as well.
        train, test: places of images, ascending.
    """

    names: list[str]
    labels: Places
    train: Places
    test: Places


def task(labels: Sequence[str | int | None], splits: Sequence[str | None], *, test_share: float, seed: int) -> Task:
    """The images parted as the data say, else class by class with `test_share` of each to test on, one at least.

    "validation" joins "train", unless the data have no "test": then it is what is tested on. Data of one part alone are
    parted anew. 1 and "1" are one label.

    Raises:
        DataError: there are no images; one has no label or, unlike others, no split; there is but one label; a label
            has one image only, or none to learn from.
    """
    if not labels:
        raise DataError("there are no images to probe")
    missing = [place for place, label in enumerate(labels) if label is None]
    if missing:
        none = len(missing) == len(labels)
        raise DataError(
            "the images have no labels, so there is nothing to probe" if none else f"image {missing[0]} has no label",
            hint="--label-field names the field; in a folder of folders the folder's name is the label",
        )
    told = [str(label) for label in labels]
    names = ordered(set(told))
    if len(names) < 2:
        raise DataError(f'all images are labelled "{names[0]:.40}"', hint="there is nothing to tell apart")
    for name, count in Counter(told).items():
        if count < 2:
            raise DataError(f'label "{name:.40}" has one image; a probe needs one to learn from and one to test on')
    place_of = {name: place for place, name in enumerate(names)}
    numbered = np.array([place_of[name] for name in told], dtype=np.int64)
    tested = _tested(splits)
    if tested is None:
        return _parted(Task(names, numbered, np.arange(len(told)), np.arange(0)), test_share, seed, "probe/split")
    found = Task(names, numbered, np.flatnonzero(~tested), np.flatnonzero(tested))
    lacking = set(numbered[found.test].tolist()) - set(numbered[found.train].tolist())
    if lacking:
        raise DataError(f'label "{names[min(lacking)]:.40}" is among the test images and not among those to learn from')
    return found


def validation(task: Task, seed: int) -> Task:
    """The part to learn from, itself parted in two, class by class: what to choose by, leaving the test images alone.

    Raises:
        DataError: a label has a single image to learn from.
    """
    return _parted(task, _VALIDATION_SHARE, seed, "probe/validation")


def draws(task: Task, shots: int | None, count: int, seed: int, among: str = "to learn from") -> list[Places]:
    """`count` draws of `shots` images of every label from those to learn from, each without replacement, ascending.

    The draw of one number is the same however many there are, and one of more shots keeps those of fewer. None is all
    of the images, in one draw.

    Args:
        among: what images those of ``task.train`` are, for the message.

    Raises:
        DataError: a label has fewer images.
    """
    if shots is None:
        return [task.train]
    by_class = [task.train[task.labels[task.train] == label] for label in _present(task)]
    for label, places in zip(_present(task), by_class, strict=True):
        if len(places) < shots:
            images = f"{len(places)} image{'s' * (len(places) > 1)} {among}"
            raise DataError(
                f'label "{task.names[label]:.40}" has {images}, fewer than {shots}',
                hint=f"--shots {len(places)} at most, or all",
            )
    found = []
    for number in range(count):
        random = np.random.Generator(np.random.Philox(derive(seed, f"probe/draws/{number}")))
        found.append(np.sort(np.concatenate([random.permutation(places)[:shots] for places in by_class])))
    return found


def _tested(splits: Sequence[str | None]) -> NDArray[np.bool_] | None:
    """True of images to test on; None where the data do not tell two parts apart."""
    there = set(splits)
    named = there - {None}
    if len(named) < 2:
        return None
    if None in there:
        raise DataError(
            f"image {list(splits).index(None)} belongs to no split, while others do",
            hint='give every image "train", "validation" or "test", or none of them',
        )
    return np.array([split == ("test" if "test" in named else "validation") for split in splits])


def _parted(task: Task, share: float, seed: int, stream: str) -> Task:
    """`task` with its `train` in two parts, `share` of every label in the second, and one image in each at least."""
    random = np.random.Generator(np.random.Philox(derive(seed, stream)))
    parts: tuple[list[Places], list[Places]] = ([], [])
    for label in _present(task):
        places = random.permutation(task.train[task.labels[task.train] == label])
        if len(places) < 2:
            raise DataError(
                f'label "{task.names[label]:.40}" has one image to learn from; to choose settings by takes two'
            )
        kept = len(places) - min(max(1, round(share * len(places))), len(places) - 1)
        parts[0].append(places[:kept])
        parts[1].append(places[kept:])
    train, test = (np.sort(np.concatenate(part)) for part in parts)
    return replace(task, train=train, test=test)


def _present(task: Task) -> list[int]:
    """The labels that there are images to learn from of."""
    return [int(label) for label in np.unique(task.labels[task.train])]
