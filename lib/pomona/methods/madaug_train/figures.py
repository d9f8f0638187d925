"""What a run shows: when and how images were augmented, how strongly, what it brought, and what it looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.io.atomic import writing
from pomona.methods.madaug_train.operations.table import Operation
from pomona.methods.madaug_train.table import HISTORY
from pomona.report.areas import areas, leading
from pomona.report.charts import Panel, Series, curves
from pomona.report.dots import Dots, dots
from pomona.report.heatmaps import HeatMap, heat_maps
from pomona.report.strips import strips

_NAMES = {
    "madaug": "learned policy",
    "transfer": "given policy",
    "random": "random policy",
    "uniform": "uniform policy",
    "none": "no policy",
    "train+val": "random policy, all labels",
}
_MOMENTS = {"first": "after the first epoch", "middle": "half way", "last": "at the end"}
_CLASSES = 30  # that are shown one by one


@dataclass(frozen=True)
class Found:
    """What the trainings of a run found.

    Attributes:
        metrics: by contender, that of the run first, and seed: the rows of metrics.jsonl, one for each epoch.
        history: by seed, how the policy chose: (epochs, classes, operations, 6), the last axis as in `HISTORY`; none
            without a policy.
        curriculum: formula of the probability that an image is augmented.
        per_class: what per_class.json holds; None where nothing was compared.
        strips: by moment (first, middle, last), uint8 (images, 1 + draws, channels, height, width), each image before
            what was drawn of it.
        strip_classes: names of the classes of those images.
    """

    metrics: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]
    history: Mapping[int, NDArray[np.floating[Any]]]
    operations: Sequence[Operation]
    classes: Sequence[str]
    curriculum: str
    per_class: Mapping[str, Any] | None
    strips: Mapping[str, NDArray[np.uint8]]
    strip_classes: Sequence[str]


def draw(found: Found, folder: Path) -> list[tuple[str, str]]:
    """Write each figure that there is something for into `folder`, as PNG and SVG; returns stem and caption of each.

    Raises:
        OutputError: a file cannot be written.
    """
    with writing(folder):
        folder.mkdir(exist_ok=True)
    drawn = [("accuracy", _accuracy(found, folder / "accuracy"))]
    if found.history:
        policy = _Policy.of(found)
        drawn += [
            ("curriculum", _curriculum(found, policy, folder / "curriculum")),
            ("strength", _strength(policy, folder / "strength")),
            ("classes", _classes(policy, found.classes, folder / "classes")),
        ]
        if any(operation.neutral is not None for operation in found.operations):
            drawn.append(("operations", _operations(policy, folder / "operations")))
    if found.per_class is not None:
        drawn.append(("per_class", _per_class(found.per_class, folder / "per_class")))
    if found.strips:
        drawn.append(("strips", _strips(found, folder / "strips")))
    return drawn


def shown(contender: str) -> str:
    """What people call `contender`."""
    return _NAMES.get(contender, contender)


# --- how well the networks learn -------------------------------------------------------------------------------------


def _accuracy(found: Found, stem: Path) -> str:
    held_out = {name: runs for name, runs in found.metrics.items() if name != "train+val"}
    panels = [
        Panel(title, "epoch", "accuracy", [_over_seeds(name, runs, key) for name, runs in shown_here.items()])
        for title, key, shown_here in (
            ("in validation", "val_accuracy", held_out),
            ("while learning", "train_accuracy", found.metrics),
        )
    ]
    curves(stem, "How well the networks learn", panels)
    seeds = max(len(runs) for runs in found.metrics.values())
    spread = f" Means of {seeds} seeds; bands reach from the lowest to the highest." if seeds > 1 else ""
    return f"Accuracy on the images of validation, and on those learned from, as they were augmented.{spread}"


def _over_seeds(contender: str, runs: Mapping[int, Sequence[Mapping[str, Any]]], key: str) -> Series:
    values = np.array([[row[key] for row in rows] for rows in runs.values()], dtype=np.float64)
    epochs = [row["epoch"] for row in next(iter(runs.values()))]
    band = (list(values.min(axis=0)), list(values.max(axis=0))) if len(runs) > 1 else (None, None)
    return Series(shown(contender), epochs, list(values.mean(axis=0)), *band)


# --- what the policy chose -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Policy:
    """The policy's choice, on average over seeds: (epochs, classes, operations).

    Attributes:
        order: places of the operations, the most probable at the end first.
        named: those that are named where there is no room for all, in the same order.
    """

    operations: list[Operation]
    probability: NDArray[np.float64]
    strength: NDArray[np.float64]
    order: list[int]
    named: list[str]

    @classmethod
    def of(cls, found: Found) -> _Policy:
        histories = np.stack([np.asarray(each, dtype=np.float64) for each in found.history.values()])
        probability, strength = (
            histories[..., HISTORY.index(name)].mean(axis=0) for name in ("probability", "strength")
        )
        operations = list(found.operations)
        layers = _layers(operations, probability)
        order = sorted(range(len(operations)), key=lambda place: -layers[place][1][-1])
        return cls(operations, probability, strength, order, leading(layers))

    def share(self, place: int) -> float:
        """How probable an operation is at the end."""
        return float(self.probability[-1, :, place].mean())


def _layers(operations: Sequence[Operation], values: NDArray[np.float64]) -> list[tuple[str, list[float]]]:
    """`values` (epochs, classes, operations) over the epochs, each class with the same weight."""
    return [(operation.name, list(row)) for operation, row in zip(operations, values.mean(axis=1).T, strict=True)]


def _curriculum(found: Found, policy: _Policy, stem: Path) -> str:
    runs = list(next(iter(found.metrics.values())).values())
    epochs = [row["epoch"] for row in runs[0]]
    augmented, planned = (
        list(np.mean([[row[key] for row in rows] for rows in runs], axis=0)) for key in ("augmented", "curriculum")
    )
    areas(
        stem,
        "When and how images are augmented",
        epochs,
        _layers(policy.operations, policy.probability),
        x_label="epoch",
        y_label="operation chosen",
        lines=[Series("augmented", epochs, augmented), Series(found.curriculum, epochs, planned, theory=True)],
        lines_label="augmented",
        order=policy.named,
    )
    return (
        "When: the share of images that were augmented, and the probability of it. How: the probability that the "
        "policy chooses an operation, on average over the classes."
    )


def _strength(policy: _Policy, stem: Path) -> str:
    areas(
        stem,
        "How strongly images are augmented",
        range(len(policy.probability)),
        _layers(policy.operations, policy.probability * policy.strength),
        x_label="epoch",
        y_label="effective strength",
        order=policy.named,
    )
    return (
        "Effective strength of an operation that is chosen, on average: 0 leaves an image alone, 100 % is the most "
        "there is. Each operation adds its probability times its strength."
    )


def _operations(policy: _Policy, stem: Path) -> str:
    moved = [place for place in policy.order if policy.operations[place].neutral is not None]
    heat = HeatMap(
        "",
        [list(policy.strength[:, :, place].mean(axis=1)) for place in moved],
        row_names=[f"{policy.operations[place].name}, {policy.share(place):.0%}" for place in moved],
    )
    title = "How strong each operation is"
    heat_maps(stem, title, [heat], x_label="epoch", y_label="", scale_label="effective strength", span=(0, 1))
    return (
        "Effective strength of each operation that has a magnitude, whether it is chosen or not. Beside its name: how "
        "probable it is in the end."
    )


def _classes(policy: _Policy, names: Sequence[str], stem: Path) -> str:
    places = [place for place in policy.order if policy.operations[place].name in policy.named]
    heat = HeatMap(
        "",
        [[round(100 * share) for share in policy.probability[-1, :, place].tolist()] for place in places],
        [policy.operations[place].name for place in places],
        list(names),
    )
    title = "Which class is augmented how"
    heat_maps(stem, title, [heat], x_label="class", y_label="", scale_label="probability, %")
    return "Probability of each operation in the end, on average over images of a class."


# --- what it brought -------------------------------------------------------------------------------------------------


def _per_class(per_class: Mapping[str, Any], stem: Path) -> str:
    classes, main = per_class["classes"], per_class["main"]
    others = [name for name in classes[0]["accuracy"] if name != main]
    known = [name for name in others if name != "train+val"] or others  # whose labels are not to be had otherwise
    best = max(known, key=lambda name: sum(row["images"] * row["accuracy"][name]["mean"] for row in classes))
    ranked = sorted(classes, key=lambda row: row["accuracy"][best]["mean"])
    rows: list[Mapping[str, Any] | None] = list(ranked)
    if len(ranked) > _CLASSES + 1:
        rows = [*ranked[: _CLASSES // 2], None, *ranked[-_CLASSES // 2 :]]
    dots(
        stem,
        f"{shown(main).capitalize()}: what each class gains",
        [row["name"] if row else f"{len(ranked) - _CLASSES} between" for row in rows],
        [
            Dots(
                f"over {shown(name)}",
                *([100 * row["gain"][name][side] if row else None for row in rows] for side in ("mean", "low", "high")),
            )
            for name in others
        ],
        x_label="points of accuracy on test images",
        beside=(
            f"accuracy with {shown(best)}",
            [f"{row['accuracy'][best]['mean']:.0%}" if row else "" for row in rows],
        ),
        first_look=1,
    )
    return (
        f"Points gained in each class, with intervals of 95 %. Classes in the order of their accuracy with "
        f"{shown(best)}, which stands at the right; the hardest first."
    )


def _strips(found: Found, stem: Path) -> str:
    epochs = len(next(iter(next(iter(found.metrics.values())).values())))
    # of moments that are the same epoch, the last
    moments = {0: "first", epochs // 2: "middle", epochs - 1: "last"}.values()
    order = sorted(range(len(found.strip_classes)), key=lambda row: found.classes.index(found.strip_classes[row]))
    originals = found.strips["last"][order, :1]
    groups = [("original", originals), *((_MOMENTS[name], found.strips[name][order, 1:]) for name in moments)]
    strips(stem, "Images under the policy", groups, [found.strip_classes[row] for row in order])
    return "Images as they are, and as the policy would augment them at three moments, each time drawn anew."
