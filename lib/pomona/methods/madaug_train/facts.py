"""What all trainings of a run have come to, as plain JSON: what report.json holds, and the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.io.directory import RunDirectory
from pomona.io.writers import brief
from pomona.methods.madaug_train.data import Prepared
from pomona.methods.madaug_train.operations.table import Operation
from pomona.methods.madaug_train.recipe import Recipe
from pomona.methods.madaug_train.record import best_epoch
from pomona.methods.madaug_train.splits import drawn
from pomona.methods.madaug_train.table import HISTORY, accuracies, per_class
from pomona.methods.madaug_train.training import Trained

Trainings = Mapping[tuple[str, int], Trained]

_MEANS = {name: HISTORY.index(name) for name in ("probability", "magnitude", "strength")}
_TOP = 3  # operations that the summary names


@dataclass(frozen=True)
class Facts:
    """The results of a run.

    Attributes:
        main: what was asked for; the others are what it is compared with.
        operations: what the policy chooses from.
        told: report.json.
        history: of `main`, by seed, (epochs, classes, operations, 6), the last axis as `HISTORY`; empty where there is
            no policy.
        warnings: what a user should know before believing a number.
    """

    main: str
    operations: tuple[Operation, ...]
    told: dict[str, Any]
    history: dict[int, NDArray[np.float32]]
    warnings: list[str]


def facts(
    settled: Recipe,
    prepared: Prepared,
    trained: Trainings,
    operations: Sequence[Operation],
    rejects: Sequence[Mapping[str, Any]],
    *,
    k: int,
    seed: int,
) -> Facts:
    """Gather the results.

    Args:
        k: operations that the policy applies to an image: a given one may differ from `settled`.
        seed: the first; bootstraps are drawn from it.
    """
    main = next(iter(trained))[0]
    names = list(dict.fromkeys(name for name, _ in trained))
    seeds = sorted({each for _, each in trained})
    split = {each: drawn(prepared, prepared.options, seed=each) for each in seeds}
    tests = {each: split[each].test for each in seeds}
    predictions = {name: {each: trained[name, each].predictions for each in seeds} for name in names}
    first = split[seeds[0]]
    learned = main in ("madaug", "transfer")
    counts = {"train": len(first.train), "val": len(first.val), "test": len(first.test), "unused": first.unused}
    told: dict[str, Any] = {
        "main": main,
        "seeds": seeds,
        "images": {**counts, "dropped": first.dropped, "classes": len(prepared.names)},
        "rejects": list(rejects),
        "recipe": asdict(settled),
        "labels": {name: _labels(name, counts, settled) for name in names},
        "tested_after_epoch": {name: [kept_epoch(trained[name, each], settled) for each in seeds] for name in names},
        **accuracies(prepared.labels, tests, predictions, main, seed=seed),
        "per_class": per_class(prepared.names, prepared.labels, tests, predictions, main, seed=seed),
        "policy": _policy(operations, [trained[main, each] for each in seeds], settled, k) if learned else None,
        "epochs": {name: _curves([trained[name, each].epochs for each in seeds]) for name in names},
    }
    history = {each: trained[main, each].history for each in seeds} if learned else {}
    return Facts(main, tuple(operations), told, history, _warnings(told, settled))


def _labels(name: str, counts: Mapping[str, int], settled: Recipe) -> int:
    """How many labels went into a training: of a policy and of the choice of an epoch, too."""
    others = name in ("madaug", "train+val") or settled.select == "validation"
    return counts["train"] + (counts["val"] if others else 0)


def kept_epoch(one: Trained, settled: Recipe) -> int:
    """The epoch, from 0, whose weights were tested and are kept: the last, or the first of the best in validation."""
    if settled.select == "last" or one.epochs[-1]["val_accuracy"] is None:
        return len(one.epochs) - 1
    return best_epoch(one.epochs)


def _policy(operations: Sequence[Operation], runs: Sequence[Trained], settled: Recipe, k: int) -> dict[str, Any]:
    """What the policies of all seeds, as they are kept, do: means over seeds, classes and images."""
    epochs = [kept_epoch(one, settled) for one in runs]
    by_seed = [choices(one, epoch) for one, epoch in zip(runs, epochs, strict=True)]
    rows = [
        {
            "name": operation.name,
            "signed": operation.signed,
            "neutral": operation.neutral,
            **{name: float(np.mean([told[place][name] for told in by_seed])) for name in _MEANS},
            "by_seed": [told[place]["probability"] for told in by_seed],
        }
        for place, operation in enumerate(operations)
    ]
    return {
        "updates": [one.updates for one in runs],
        "k": k,
        "uniform": 1 / len(operations),
        "operations": sorted(rows, key=lambda row: -row["probability"]),
        "entropy": [one.epochs[epoch]["entropy"] for one, epoch in zip(runs, epochs, strict=True)],
        "least_entropy": min(row["entropy"] for one in runs for row in one.epochs),
    }


def choices(one: Trained, epoch: int) -> list[dict[str, float]]:
    """How often and how strongly the policy chose each operation after `epoch`: means over the classes of the images
    watched."""
    means = one.history[epoch].astype(np.float64).mean(0)
    return [{name: float(row[place]) for name, place in _MEANS.items()} for row in means]


def _curves(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of the epochs, each number the mean over seeds; None where a seed has none."""
    curves = []
    for rows in zip(*runs, strict=True):
        each: dict[str, Any] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            each[name] = None if None in values else float(np.mean(values))
        curves.append(each)
    return curves


def _warnings(told: Mapping[str, Any], settled: Recipe) -> list[str]:
    policy = told["policy"]
    if policy is None or told["main"] == "transfer":
        return []
    said = []
    if policy["least_entropy"] < settled.entropy_warn:
        said.append(
            f"the policy fell to {policy['least_entropy']:.2f} of the largest entropy of choice: it may have collapsed "
            "onto an operation; a smaller --policy-lr, or a larger --policy-every, moves it less"
        )
    return said


def summary(found: Facts, work: RunDirectory) -> dict[str, Any]:
    """One line for standard output."""
    told = found.told
    policy, classes = told["policy"], told["per_class"]
    parts = {name: count for name, count in told["images"].items() if name != "classes"}
    line: dict[str, Any] = {
        "images": sum(parts.values()),
        "parts": parts,
        "rejected": len(told["rejects"]),
        "accuracy": {
            name: {part: row[part] for part in ("mean", "sd", "seeds")} for name, row in told["accuracy"].items()
        },
    }
    if policy is not None:
        line["policy_updates"] = sum(policy["updates"])
        line["top_ops"] = {row["name"]: row["probability"] for row in policy["operations"][:_TOP]}
    line["worst_class_gain"] = {name: gain["hardest_class_gain"] for name, gain in classes["against"].items()}
    shown: dict[str, Any] = brief(line)
    return shown | {"run": str(work.path)}
