"""What the trainings of a run come to in numbers: over all images, class by class, and what a policy did in time.

Every contender is tested on the same images under a seed, and each seed may part the images in its own way. So
differences are paired, seed by seed and image by image, and intervals resample seeds and images both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.errors import CheckFailed
from pomona.io.arrow import fitting
from pomona.io.atomic import atomic_file, writing
from pomona.methods.madaug_train.operations.table import Operation
from pomona.methods.madaug_train.splits import Places
from pomona.report.outcomes import Accuracy, accuracy, difference

Predictions = Mapping[str, Mapping[int, Places]]
"""By contender and seed: the class of each test image of that seed."""

HISTORY = ("probability", "probability_sd", "magnitude", "magnitude_sd", "strength", "strength_sd")
"""What the last axis of a history holds: means over images of a class, each with its standard deviation."""


def accuracies(
    labels: Places, tests: Mapping[int, Places], predictions: Predictions, main: str, *, seed: int
) -> dict[str, Any]:
    """Accuracy of every contender over seeds, and of `main` minus each other one, as plain JSON.

    Args:
        labels: of all images.
        tests: by seed, places of the images that were tested on.
        seed: of the resampling.

    Returns:
        ``accuracy``: by contender its mean, standard deviation over seeds (n - 1; None of one), interval, number of
        seeds and of test images, and accuracy by seed; ``differences``: by contender mean and interval.
    """
    answers = _answers(labels, tests, predictions)
    return {
        "accuracy": {
            name: {**_told(accuracy(right, seed=seed)), "by_seed": np.nanmean(right, axis=1).tolist()}
            for name, right in answers.items()
        },
        "differences": {
            name: asdict(difference(answers[main], right, seed=seed)) for name, right in answers.items() if name != main
        },
    }


def per_class(
    names: Sequence[str],
    labels: Places,
    tests: Mapping[int, Places],
    predictions: Predictions,
    main: str,
    *,
    seed: int,
) -> dict[str, Any]:
    """Accuracy of each class, and who gains: does `main` help the classes that are hard without it?

    The class that is worst without `main` is chosen by answers that its gain is then measured on, so that chance alone
    makes that gain positive. The class that is hardest for both together is chosen without taking sides: where `main`
    changes nothing, its gain is as often negative. No interval knows of the choice.

    Args:
        names: of the classes.
        labels, tests, seed: as in `accuracies`.

    Returns:
        ``classes``: a row for each that was tested, in their order, with its name, test images (of the seed that has
        fewest), accuracy by contender, and by contender the gain of `main` over it with its interval; ``untested``: the
        names of the others; ``against``: by contender, how many classes gain and how many lose, the gains of the
        class that is worst under it and of the one that is hardest for both, and the smallest of all.
    """
    answers = _answers(labels, tests, predictions)
    columns = labels[_images(tests)]
    others = [name for name in answers if name != main]
    rows = []
    for place, name in enumerate(names):
        of_class = {contender: _tested(right[:, columns == place]) for contender, right in answers.items()}
        if not of_class[main].size:
            continue
        ours = accuracy(of_class[main], seed=seed)
        gains = {other: asdict(difference(of_class[main], of_class[other], seed=seed)) for other in others}
        by_contender = {
            contender: _told(ours if contender == main else accuracy(right, seed=seed))
            for contender, right in of_class.items()
        }
        rows.append({"name": name, "images": ours.tests, "accuracy": by_contender, "gain": gains})
    there = {row["name"] for row in rows}
    return {
        "main": main,
        "classes": rows,
        "untested": [name for name in names if name not in there],
        "against": {other: _against(rows, main, other) for other in others},
    }


def _against(rows: Sequence[Mapping[str, Any]], main: str, other: str) -> dict[str, Any]:
    """How the gains of `main` over `other` spread over the classes; of equal ones the first."""
    hardest = min(rows, key=lambda row: row["accuracy"][main]["mean"] + row["accuracy"][other]["mean"])
    worst = min(rows, key=lambda row: row["accuracy"][other]["mean"])
    least = min(rows, key=lambda row: row["gain"][other]["mean"])
    return {
        "gaining": sum(row["gain"][other]["mean"] > 0 for row in rows),
        "losing": sum(row["gain"][other]["mean"] < 0 for row in rows),
        "worst_class": worst["name"],
        "worst_class_accuracy": worst["accuracy"][other]["mean"],
        "worst_class_gain": worst["gain"][other]["mean"],
        "worst_class_gain_low": worst["gain"][other]["low"],
        "worst_class_gain_high": worst["gain"][other]["high"],
        "hardest_class": hardest["name"],
        "hardest_class_gain": hardest["gain"][other]["mean"],
        "smallest_gain_class": least["name"],
        "smallest_gain": least["gain"][other]["mean"],
    }


def _told(found: Accuracy) -> dict[str, Any]:
    return {
        "mean": found.mean,
        "sd": found.deviation,
        "low": found.low,
        "high": found.high,
        "seeds": found.draws,
        "tests": found.tests,
    }


def _images(tests: Mapping[int, Places]) -> Places:
    """Places of the images that any seed was tested on, ascending."""
    return np.unique(np.concatenate(list(tests.values())))


def _answers(labels: Places, tests: Mapping[int, Places], predictions: Predictions) -> dict[str, NDArray[np.float64]]:
    """By contender, (seeds, images): 1 for a right answer, 0 for a wrong one, NaN where there is none."""
    images = _images(tests)
    found = {}
    for name, by_seed in predictions.items():
        right = np.full((len(tests), len(images)), np.nan)
        for row, (seed, places) in zip(right, tests.items(), strict=True):
            row[np.searchsorted(images, places)] = by_seed[seed] == labels[places]
        found[name] = right
    return found


def _tested(right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without the seeds that have no answer."""
    return right[~np.isnan(right).all(axis=1)]


# --- history ---------------------------------------------------------------------------------------------------------


def write_history(
    path: Path,
    history: Mapping[int, NDArray[np.floating[Any]]],
    names: Sequence[str],
    operations: Sequence[Operation],
) -> None:
    """Write ``policy_history.parquet``: a row for each seed, epoch, class and operation, in this order.

    Args:
        history: by seed, (epochs, classes, operations, 6), the last as in `HISTORY`.

    Raises:
        CheckFailed: a number is not finite.
        OutputError: the disk is full, or the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for seed, numbers in history.items():
        if not np.isfinite(numbers).all():
            epoch, place, operation, _ = np.argwhere(~np.isfinite(numbers))[0]
            raise CheckFailed(
                f'the policy of seed {seed} for {operations[operation].name} on "{names[place]:.40}" was not finite '
                f"after epoch {epoch}"
            )
        epochs, classes, width = np.indices(numbers.shape[:3]).reshape(3, -1)
        labels = {
            "seed": pa.array(np.full(len(epochs), seed, dtype=np.int64)),
            "epoch": pa.array(epochs.astype(np.int32)),
            "class": pa.array(names).take(pa.array(classes)),
            "operation": pa.array([operation.name for operation in operations]).take(pa.array(width)),
        }
        flat = numbers.reshape(-1, len(HISTORY)).astype(np.float32)
        tables.append(pa.table({**labels, **{name: pa.array(flat[:, place]) for place, name in enumerate(HISTORY)}}))
    with atomic_file(path) as file, writing(path), fitting():
        pq.write_table(pa.concat_tables(tables), file)
