"""Which images the network learns from, which the policy is learned on, and which both are tested on.

What the data says is kept. What it leaves open is drawn class by class under a seed, and images with the same pixels
are drawn together, so that no part ever holds what another one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from pomona.errors import DataError
from pomona.methods.madaug_train.config import SplitOptions
from pomona.runtime.seeds import derive

if TYPE_CHECKING:
    from pomona.methods.madaug_train.data import Prepared

Places = NDArray[np.int64]

_CHUNK = 16 << 20  # bytes of pixels that are summed at a time
_PURPOSE = {"train": "to learn from", "val": "to learn the policy on", "test": "to test on"}


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What is known of images besides their pixels.

    Attributes:
        labels: the place of each image's label in `names`.
        names: the labels in order: by value where all are whole numbers, else by their characters.
        ids: what each image is called.
        splits: what each image is for by the data, "train", "validation" or "test"; those of "train" are parted further
            where they have to be; None is for nothing.
        contents: of each image the place of the first that has the same pixels.
    """

    labels: Places
    names: list[str]
    ids: list[str]
    splits: list[str | None]
    contents: Places


@dataclass(frozen=True)
class Drawn:
    """Places of images, ascending.

    Attributes:
        train, val, test: of each part; no two hold the same pixels.
        unused: how many images are in none, as there are more than were asked for.
        dropped: how many are in none because another part holds the same pixels.
    """

    train: Places
    val: Places
    test: Places
    unused: int
    dropped: int


@dataclass(frozen=True)
class Parts(Drawn):
    """The parts of one training.

    Attributes:
        mean, std: of each channel over all pixels of the part to learn from, which are in [0, 1]; the deviation of a
            channel that is the same everywhere is given as 1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


def parts(prepared: Prepared, options: SplitOptions, *, seed: int) -> Parts:
    """The parts under `seed`; `options` are ``prepared.options`` as a rule.

    Raises:
        DataError: as `drawn`.
    """
    found = drawn(prepared, options, seed=seed)
    mean, std = moments(prepared.images, found.train)
    return Parts(**vars(found), mean=mean, std=std)


def drawn(listed: Listed, options: SplitOptions, *, seed: int) -> Drawn:
    """The images parted as the data says, and where it does not, class by class under `seed`.

    A part that is not there is drawn from the images of "train": ``--test-fraction`` of each class first, then
    ``--val-images`` in all or ``--val-fraction`` of each class, then ``--train-images``, or all that are left. Where
    both numbers are given and no part is there, the test images are all others.

    Raises:
        DataError: parts share pixels, unless ``--overlap drop``; there is one class only, or a class has fewer than two
            images to learn from, or none in a part that is drawn; there are fewer images than asked for.
    """
    own, dropped = overlap(listed, options.overlap)
    pool, val, test = own["train"], own["validation"], own["test"]
    missing = [not len(val), not len(test)]
    _refuse_classes(listed, pool, val, test, least=max(2, 1 + sum(missing)))
    parting = _Parting(listed, seed)
    all_others = all(missing) and options.train_images is not None and options.val_images is not None
    if not len(test) and not all_others:
        test, pool = parting.share(pool, options.test_fraction, "test", leaving=1 + missing[0])
    if len(val):
        val = val if options.val_images is None else parting.number(val, options.val_images, "val")[0]
    elif options.val_images is not None:
        val, pool = parting.number(pool, options.val_images, "val", leaving=1)
    else:
        val, pool = parting.share(pool, options.val_fraction, "val", leaving=1)
    train, left = (
        (pool, pool[:0]) if options.train_images is None else parting.number(pool, options.train_images, "train")
    )
    if all_others:
        test = left
        parting.refuse_few(
            test, pool, 1, "there are none left to test on", lambda _: "a smaller --train-images or --val-images"
        )
    used = len(train) + len(val) + len(test)
    return Drawn(train, val, test, len(listed.ids) - used - dropped, dropped)


def overlap(listed: Listed, mode: Literal["refuse", "drop"]) -> tuple[dict[str, Places], int]:
    """Places by what the data says that they are for, without those of the same pixels in another part.

    Returns:
        The places, and how many were dropped: those of "train" that are in another part, of "validation" in "test".

    Raises:
        DataError: `mode` is "refuse", and parts share pixels; how many, and the first two by name.
    """
    splits = np.array([split or "" for split in listed.splits])
    own = {split: np.flatnonzero(splits == split) for split in ("train", "validation", "test")}
    shared: list[str] = []
    dropped = 0
    for kept, taught in (("test", "train"), ("validation", "train"), ("test", "validation")):
        there = np.zeros(len(splits), dtype=bool)
        there[listed.contents[own[kept]]] = True
        twins = there[listed.contents[own[taught]]]
        if twins.any():
            first = own[taught][twins][0]
            other = own[kept][listed.contents[own[kept]] == listed.contents[first]][0]
            count = int(twins.sum())
            many = f"images are {kept} images" if count > 1 else f"image is a {kept} image"
            shared.append(f'{count:,} {taught} {many} too ("{listed.ids[first]:.80}" and "{listed.ids[other]:.80}")')
            dropped += count
            own[taught] = own[taught][~twins]
    if shared and mode == "refuse":
        raise DataError(
            f"{', '.join(shared)}, pixel by pixel", hint="--overlap drop leaves them out of what is learned from"
        )
    return own, dropped


def moments(images: NDArray[np.uint8], places: Places) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel of images (N, C, H, W) at `places`, pixels in [0, 1]; 1 for none."""
    _, channels, height, width = images.shape
    sums, squares = np.zeros(channels, dtype=np.int64), np.zeros(channels, dtype=np.int64)
    step = max(1, _CHUNK // (channels * height * width))
    for start in range(0, len(places), step):
        some = images[places[start : start + step]]
        sums += some.sum(axis=(0, 2, 3), dtype=np.int64)
        squares += np.square(some, dtype=np.uint16).sum(axis=(0, 2, 3), dtype=np.int64)
    count = len(places) * height * width
    mean = [int(total) / count for total in sums]
    # in whole numbers, as differences of large squares lose their digits
    variance = [count * int(square) - int(total) ** 2 for total, square in zip(sums, squares, strict=True)]
    return (
        tuple(each / 255 for each in mean),
        tuple(math.sqrt(each) / count / 255 if each else 1.0 for each in variance),
    )


def _refuse_classes(listed: Listed, pool: Places, val: Places, test: Places, *, least: int) -> None:
    """Raise what speaks against learning from `pool`, of which each class is to be parted into so many as `least`."""
    if not len(pool):
        raise DataError("there are no images to learn from", hint="--resplit parts all images anew")
    counts = np.bincount(listed.labels[pool], minlength=len(listed.names))
    for places, purpose in ((val, "policy is learned on"), (test, "network is tested on")):
        strange = places[counts[listed.labels[places]] == 0]
        if len(strange):
            raise DataError(
                f'{listed.ids[strange[0]]:.80}: label "{listed.names[listed.labels[strange[0]]]:.40}" is among the '
                f"images that the {purpose}, and not among those to learn from"
            )
    there = np.flatnonzero(counts)
    if len(there) < 2:
        raise DataError(f'all images are labelled "{listed.names[there[0]]:.40}"; there is nothing to tell apart')
    firsts = np.unique(listed.contents[pool], return_index=True)[1]
    unlike = np.bincount(listed.labels[pool][firsts], minlength=len(listed.names))
    few = there[unlike[there] < least]
    if len(few):
        copies = ", not counting copies," if unlike[few[0]] < counts[few[0]] else ""
        raise DataError(
            f'label "{listed.names[few[0]]:.40}" has {_images(int(unlike[few[0]]))}{copies} to learn from',
            hint=f"{least} are the least: to learn from, to learn the policy on, and to test on"
            if least > 2
            else "2 are the least",
        )


def _images(count: int) -> str:
    return f"{count:,} image{'s' * (count != 1)}"


class _Parting:
    """Draws from places of images, class by class and without parting what has the same pixels."""

    def __init__(self, listed: Listed, seed: int) -> None:
        self._listed, self._seed = listed, seed

    def share(self, places: Places, share: float, part: str, *, leaving: int) -> tuple[Places, Places]:
        """`share` of each class for `part`, rounded, one at least, and the others, `leaving` at least."""
        taken, left = self._parted(places, lambda sizes: np.floor(share * sizes + 0.5).astype(np.int64), part)
        option = f"--{part}-fraction"
        self.refuse_few(
            taken,
            places,
            1,
            f"{option} {share:g} gives it {{}} {_PURPOSE[part]}",
            lambda size: f"{option} {math.ceil(500 / size) / 1000:g}",
        )
        self.refuse_few(
            left,
            places,
            leaving,
            f"{option} {share:g} leaves it {{}} for the other parts",
            lambda size: f"{option} {(math.ceil(1000 - 1000 * (leaving - 0.5) / size) - 1) / 1000:g}",
        )
        return taken, left

    def number(self, places: Places, number: int, part: str, *, leaving: int = 0) -> tuple[Places, Places]:
        """`number` for `part`, classes in proportion, one of each at least, and the others, `leaving` at least."""
        option, total = f"--{part}-images", len(places)
        if number > total:
            raise DataError(f"{option} {number:,}: there are {total:,} images", hint="give fewer")
        taken, left = self._parted(places, lambda sizes: _in_proportion(number, sizes), part)
        self.refuse_few(
            taken,
            places,
            1,
            f"{option} {number:,} gives it {{}} {_PURPOSE[part]}",
            lambda size: f"{option} {math.ceil(total / size)}",
        )
        self.refuse_few(
            left,
            places,
            leaving,
            f"{option} {number:,} leaves it {{}} to learn from",
            lambda size: f"{option} {total - math.ceil(leaving * total / size)}",
        )
        return taken, left

    def _parted(self, places: Places, amounts: Callable[[Places], Places], part: str) -> tuple[Places, Places]:
        """As many of each class as `amounts` makes of their numbers, and the others, both ascending.

        Images with the same pixels count as of the class of the first. Where some are that do not fit in any more,
        single ones take their place.
        """
        random = np.random.Generator(np.random.Philox(derive(self._seed, f"split/{part}")))
        _, firsts, group, sizes = np.unique(
            self._listed.contents[places], return_index=True, return_inverse=True, return_counts=True
        )
        labels = self._listed.labels[places][firsts]
        wanted = amounts(np.bincount(labels, sizes, len(self._listed.names)).astype(np.int64))
        order = random.permutation(len(firsts))
        order = order[np.argsort(labels[order], kind="stable")]
        taken = np.zeros(len(firsts), dtype=bool)
        ends = np.cumsum(np.bincount(labels, minlength=len(wanted)))
        for mine, most in zip(np.split(order, ends[:-1]), wanted, strict=True):
            so_far = np.cumsum(sizes[mine])
            fitting = so_far <= most
            taken[mine[fitting]] = True
            short = most - (so_far[fitting][-1] if fitting.any() else 0)
            taken[mine[~fitting & (sizes[mine] == 1)][:short]] = True
        chosen = taken[group]
        return places[chosen], places[~chosen]

    def refuse_few(self, part: Places, of: Places, least: int, what: str, enough: Callable[[int], str]) -> None:
        """Raise `what` where a class of the images `of` has fewer than `least` in `part`.

        Args:
            what: with room for their number.
            enough: the option with which a class of that size has as many.
        """
        listed = self._listed
        sizes, there = (np.bincount(listed.labels[places], minlength=len(listed.names)) for places in (of, part))
        few = np.flatnonzero((sizes > 0) & (there < least))
        if len(few):
            said = what.format(there[few[0]] or "none")
            raise DataError(
                f'label "{listed.names[few[0]]:.40}" has {_images(int(sizes[few[0]]))}, and {said}',
                hint=f"try {enough(int(sizes[few].min()))}",
            )


def _in_proportion(number: int, sizes: Places) -> Places:
    """`number` in parts that are to one another as `sizes`, by largest remainders."""
    total = int(sizes.sum())
    found, remainders = np.divmod(number * sizes, total)
    most = np.argsort(-remainders, kind="stable")[: number - int(found.sum())]
    found[most] += 1
    return found
