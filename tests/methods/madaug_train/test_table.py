"""Accuracies over seeds and classes, against numbers computed one by one; the history as a table of typed columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from pomona.errors import CheckFailed, OutputError
from pomona.methods.madaug_train.operations.table import OPERATIONS
from pomona.methods.madaug_train.table import HISTORY, accuracies, per_class, write_history

NAMES = ["ape", "bee", "cow"]
RANDOM = np.random.default_rng(0)
IMAGES = 300
LABELS = RANDOM.integers(0, 3, IMAGES)


def study(seeds: int, *, apart: bool, skill: dict[str, tuple[float, float, float]], size: int = 120) -> tuple[Any, Any]:
    """Test images and predictions; each contender is right about each class with these chances.

    Args:
        apart: every seed is tested on images of its own draw.
    """
    random = np.random.default_rng(5)
    tests = {}
    for seed in range(seeds):
        tests[seed] = np.sort(random.permutation(IMAGES)[:size]) if apart or not seed else tests[0]
    predictions = {
        name: {
            seed: np.where(
                random.random(len(places)) < np.array(chances)[LABELS[places]], LABELS[places], (LABELS[places] + 1) % 3
            )
            for seed, places in tests.items()
        }
        for name, chances in skill.items()
    }
    return tests, predictions


SKILL = {"madaug": (0.75, 0.95, 0.85), "random": (0.9, 0.85, 0.5), "none": (0.88, 0.7, 0.6)}


@pytest.mark.parametrize("apart", [False, True])
def test_means_and_deviations_are_over_seeds(apart: bool) -> None:
    tests, predictions = study(4, apart=apart, skill=SKILL)
    found = accuracies(LABELS, tests, predictions, "madaug", seed=0)
    for name, row in found["accuracy"].items():
        each = [float(np.mean(predictions[name][seed] == LABELS[tests[seed]])) for seed in tests]
        assert row["by_seed"] == pytest.approx(each) and (row["seeds"], row["tests"]) == (4, 120)
        assert row["mean"] == pytest.approx(sum(each) / 4) and row["sd"] == pytest.approx(np.std(each, ddof=1))
        assert row["low"] < row["mean"] < row["high"]
    assert list(found["differences"]) == ["random", "none"]
    means = {name: row["mean"] for name, row in found["accuracy"].items()}
    for name, gain in found["differences"].items():
        assert gain["mean"] == pytest.approx(means["madaug"] - means[name])
        assert 0 < gain["low"] < gain["mean"] < gain["high"]
    json.dumps(found, allow_nan=False)


def test_one_seed_has_no_deviation_and_one_contender_no_difference() -> None:
    tests, predictions = study(1, apart=False, skill={"none": SKILL["none"]})
    found = accuracies(LABELS, tests, predictions, "none", seed=0)
    assert found["accuracy"]["none"]["sd"] is None and found["differences"] == {}
    classes = per_class(NAMES, LABELS, tests, predictions, "none", seed=0)
    assert classes["against"] == {} and [row["gain"] for row in classes["classes"]] == [{}, {}, {}]


def test_a_difference_is_paired_image_by_image_though_seeds_are_tested_on_other_images() -> None:
    """Two contenders that are wrong about the same images but for a few differ surely, though both are unsure."""
    tests, predictions = study(3, apart=True, skill={"none": (0.6, 0.6, 0.6)})
    predictions["madaug"] = {seed: answers.copy() for seed, answers in predictions["none"].items()}
    for seed, places in tests.items():
        wrong = np.flatnonzero(predictions["none"][seed] != LABELS[places])[:6]
        predictions["madaug"][seed][wrong] = LABELS[places][wrong]
    found = accuracies(LABELS, tests, predictions, "madaug", seed=0)
    gain, alone = found["differences"]["none"], found["accuracy"]["none"]
    assert gain["mean"] == pytest.approx(0.05) and gain["low"] > 0
    assert gain["high"] - gain["low"] < 0.6 * (alone["high"] - alone["low"])


@pytest.mark.parametrize("apart", [False, True])
def test_classes_have_their_accuracy_and_their_gain_over_each_contender(apart: bool) -> None:
    tests, predictions = study(3, apart=apart, skill=SKILL)
    found = per_class(NAMES, LABELS, tests, predictions, "madaug", seed=0)
    assert [row["name"] for row in found["classes"]] == NAMES and found["main"] == "madaug"
    for place, row in enumerate(found["classes"]):
        right = {
            name: [predictions[name][seed][LABELS[tests[seed]] == place] == place for seed in tests] for name in SKILL
        }
        assert row["images"] == min(map(len, right["madaug"]))
        means = {name: float(np.concatenate(answers).mean()) for name, answers in right.items()}
        for name, answers in right.items():
            assert row["accuracy"][name]["mean"] == pytest.approx(means[name])
            assert row["accuracy"][name]["sd"] == pytest.approx(np.std([each.mean() for each in answers], ddof=1))
        for name in ("random", "none"):
            gain = row["gain"][name]
            assert gain["mean"] == pytest.approx(means["madaug"] - means[name])
            assert gain["low"] <= gain["mean"] <= gain["high"]
    json.dumps(found, allow_nan=False)


def test_the_worst_class_is_the_worst_without_the_policy_and_the_smallest_gain_is_of_all_classes() -> None:
    tests, predictions = study(3, apart=False, skill=SKILL)
    found = per_class(NAMES, LABELS, tests, predictions, "madaug", seed=0)
    rows = {row["name"]: row for row in found["classes"]}
    for name, against in found["against"].items():
        accuracy = {each: rows[each]["accuracy"][name]["mean"] for each in NAMES}
        gain = {each: rows[each]["gain"][name]["mean"] for each in NAMES}
        worst = min(accuracy, key=lambda each: accuracy[each])
        assert against["worst_class"] == worst == "cow" and against["worst_class_gain"] == gain[worst] > 0.15
        assert against["worst_class_gain_low"] < gain[worst] < against["worst_class_gain_high"]
        assert against["smallest_gain"] == min(gain.values()) == gain[against["smallest_gain_class"]]
        assert against["gaining"] == sum(value > 0 for value in gain.values())
        assert against["gaining"] + against["losing"] <= 3


def test_chance_alone_makes_a_worst_class_gain_and_no_gain_of_the_class_that_is_hardest_for_both() -> None:
    """Two networks that are right as often, in all of ten classes."""
    labels = np.repeat(np.arange(10), 40)
    tests = {0: np.arange(400)}
    worst, hardest = [], []
    for trial in range(60):
        right = np.random.default_rng(trial).random((2, 400)) < 0.9
        predictions = {
            name: {0: np.where(row, labels, 10)} for name, row in zip(("madaug", "none"), right, strict=True)
        }
        found = per_class([str(name) for name in range(10)], labels, tests, predictions, "madaug", seed=0)["against"]
        worst.append(found["none"]["worst_class_gain"])
        hardest.append(found["none"]["hardest_class_gain"])
    assert np.mean(worst) > 0.05
    assert abs(np.mean(hardest)) < 3 * np.std(hardest) / np.sqrt(60) < 0.03


def test_a_class_that_no_seed_was_tested_on_is_named_and_one_of_some_seeds_counts_for_those() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    tests = {0: np.array([0, 1, 2, 4]), 1: np.array([0, 1, 2, 3])}
    right = {seed: labels[places] for seed, places in tests.items()}
    wrong = {seed: (labels[places] + (labels[places] == 1)) for seed, places in tests.items()}
    found = per_class(["a", "b", "c", "d"], labels, tests, {"madaug": right, "none": wrong}, "madaug", seed=0)
    assert found["untested"] == ["d"] and [row["name"] for row in found["classes"]] == ["a", "b", "c"]
    assert [row["accuracy"]["madaug"]["seeds"] for row in found["classes"]] == [2, 2, 1]
    assert [row["gain"]["none"]["mean"] for row in found["classes"]] == [0, 1, 0]


# --- history ---------------------------------------------------------------------------------------------------------

PLAYED = OPERATIONS[:4]


def history(seed: int) -> Any:
    return np.random.default_rng(seed).random((3, 2, 4, len(HISTORY)), dtype=np.float32)


def test_a_history_has_a_row_for_every_seed_epoch_class_and_operation(tmp_path: Path) -> None:
    given = {4: history(0), 5: history(1)}
    names = ["ape", 'b"ee,\n']
    write_history(tmp_path / "h.parquet", given, names, PLAYED)
    schema = pq.read_schema(tmp_path / "h.parquet")
    assert [str(schema.field(name).type) for name in ("seed", "epoch", "class", "operation", "strength_sd")] == [
        *("int64", "int32", "string", "string", "float")
    ]
    table = pd.read_parquet(tmp_path / "h.parquet")
    assert len(table) == 2 * 3 * 2 * 4 and list(table.columns) == ["seed", "epoch", "class", "operation", *HISTORY]
    for seed, numbers in given.items():
        for (epoch, place, operation), row in zip(
            np.ndindex(3, 2, 4), table[table.seed == seed].itertuples(index=False), strict=True
        ):
            assert tuple(row[:4]) == (seed, epoch, names[place], PLAYED[operation].name)
            assert row[4:] == pytest.approx(tuple(numbers[epoch, place, operation]))
    first = (tmp_path / "h.parquet").read_bytes()
    write_history(tmp_path / "h.parquet", given, names, PLAYED)
    assert (tmp_path / "h.parquet").read_bytes() == first


def test_a_history_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    numbers = history(0)
    numbers[2, 1, 3, 4] = np.nan
    with pytest.raises(CheckFailed, match=rf'seed 7 for {PLAYED[3].name} on "bee" was not finite after epoch 2'):
        write_history(tmp_path / "h.parquet", {7: numbers}, ["ape", "bee"], PLAYED)
    assert not list(tmp_path.iterdir())


def test_a_history_on_a_full_disk_is_exit_6(tmp_path: Path) -> None:
    (tmp_path / ".h.parquet.partial").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="no space left"):
        write_history(tmp_path / "h.parquet", {0: history(0)}, ["ape", "bee"], PLAYED)
