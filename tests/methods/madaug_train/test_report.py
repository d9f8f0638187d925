"""What a run says of itself is so, whatever was asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pomona.methods.madaug_train import report
from pomona.methods.madaug_train.config import Config
from pomona.methods.madaug_train.facts import kept_epoch
from pomona.methods.madaug_train.recipe import recipe

OPERATIONS = [
    {"name": "Invert", "signed": False, "neutral": None, "probability": 0.5, "magnitude": 0.4, "strength": 1.0},
    {"name": "Rotate", "signed": True, "neutral": 0.5, "probability": 0.3, "magnitude": 0.6, "strength": 0.25},
    {"name": "Solarize", "signed": False, "neutral": 1.0, "probability": 0.2, "magnitude": 0.75, "strength": 0.25},
]


def accuracy(mean: float, sd: float | None = None) -> dict[str, Any]:
    return {"mean": mean, "sd": sd, "low": mean - 0.02, "high": mean + 0.03, "tests": 100}


def told(main: str = "madaug", others: tuple[str, ...] = ("none",), seeds: int = 2, **options: Any) -> dict[str, Any]:
    names = (main, *others)
    sd = 0.012 if seeds > 1 else None
    means = {name: 0.9 - 0.1 * place for place, name in enumerate(names)}
    rows = [
        {
            "name": name,
            "images": 50,
            "accuracy": {each: accuracy(mean + shift) for each, mean in means.items()},
        }
        for name, shift in (("cat", -0.05), ("dog", 0.05))
    ]
    gain = {"gaining": 2, "hardest_class": "cat", "hardest_class_gain": 0.1, "smallest_gain": -0.04}
    policy = {
        "operations": OPERATIONS,
        "k": 2,
        "uniform": 1 / 3,
        "updates": [40] * seeds,
        "entropy": [0.5 + 0.2 * seed for seed in range(seeds)],
    }
    return {
        "main": main,
        "seeds": list(range(seeds)),
        "accuracy": {name: accuracy(mean, sd) for name, mean in means.items()},
        "differences": {name: {"mean": 0.1, "low": 0.05, "high": 0.15} for name in others},
        "images": {"train": 1000, "val": 1, "test": 1234, "unused": 1, "dropped": 0, "classes": 2},
        "labels": dict.fromkeys(names, 1001),
        "recipe": vars(recipe(Config(**options), "digits")),
        "rejects": [{}],
        "policy": policy if main in ("madaug", "transfer") else None,
        "per_class": {
            "main": main,
            "classes": rows,
            "against": {name: {**gain, "smallest_gain_class": "dog"} for name in others},
        },
    }


def said(found: dict[str, Any]) -> str:
    parts = []
    for section in report.sections(found):
        parts += [section.title, *section.verdict, *section.notes]
        parts += [" | ".join(row) for table in section.tables for row in table.rows]
    return "\n".join(parts)


def test_numbers_stand_in_the_sentences_that_they_belong_to() -> None:
    text = said(told())
    for sentence in (
        "Learned policy: 90.0 % ± 1.2, over 2 seeds (95 % interval 88.0 % to 93.0 %).",
        "Against no policy (80.0 % ± 1.2): +10.0 points (95 % interval +5.0 to +15.0).",
        "Tested once, after the last epoch, on 1,234 images that no training and no choice has seen.",
        "learned policy | 1,001 | 90.0 % | 1.2",
        "Most likely at the end: Invert 0.50 (strength 1.00), Rotate 0.30 (strength 0.25), Solarize 0.20 "
        "(strength 0.25); all alike would be 0.33 each.",
        "The policy took 80 steps over 2 seeds; its choice is at 0.60 of the entropy of all alike.",
        "Invert | 0.500 | 1.00 | –",
        "Rotate | 0.300 | 0.25 | –",
        "Solarize | 0.200 | 0.25 | 0.75",
        "An image is augmented with probability tanh(epoch / 20); then 2 of the operations are drawn by its own",
        "Against no policy: 2 of 2 classes gain; the worst class, cat, gains +10.0 points; the least gain is "
        "-4.0, in dog.",
        "cat | 50 | 85.0 % | 75.0 %",
        "1,000 images to learn from, 1 for the policy, 1,234 to test on; 2 classes.",
        "1 image in no part.",
        "1 image could not be read.",
        "Intervals resample seeds and test images both",
    ):
        assert sentence in text
    assert "One seed" not in text and "random policy is" not in text


def test_one_seed_has_no_spread_and_says_so() -> None:
    text = said(told(seeds=1))
    assert "Learned policy: 90.0 %, over 1 seed (95" in text and "learned policy | 1,001 | 90.0 % | –" in text
    assert "One seed: intervals tell what other test images" in text
    assert "resample seeds" not in text and "±" not in text
    assert "The policy took 40 steps; its choice is at 0.50" in text


def test_weights_of_the_best_epoch_are_not_those_of_the_last() -> None:
    text = said(told(others=("train+val",), select="validation"))
    assert "Tested once, with the weights of the epoch that was best in validation (all labels: after the last)" in text
    assert "Most likely in the epoch that was tested" in text and "at the end" not in text
    assert "(all labels" not in said(told(select="validation"))


def test_a_policy_that_is_given_is_not_said_to_be_learned_or_kept() -> None:
    text = said(told("transfer"))
    assert "The policy took" not in text and "policy.json" not in text
    assert "the source network's features" in text and "policy.json" in said(told())


def test_nothing_is_said_of_what_was_not_trained() -> None:
    text = said(told("none", ()))
    assert "No policy: 90.0 %" in text and "Against" not in text and "policy is learned" not in text
    assert "Worst is cat: 85.0 %." in text and "worst class" not in text.lower()
    titles = [section.title for section in report.sections(told("random", ("uniform",)))]
    assert titles == ["Accuracy", "Classes", "Images"]
    compared = said(told("none", ("random", "uniform", "train+val")))
    assert "The random policy is one that has learned nothing" in compared and "The uniform policy draws" in compared
    assert "labels too" in compared and "labels too" in said(told())


def test_the_curriculum_is_told_as_it_is() -> None:
    assert report.curriculum({"tau": 0.0, "curriculum_floor": 0.01}) == "1"
    assert report.curriculum({"tau": 40.0, "curriculum_floor": 0.01}) == "tanh(epoch / 40) + 0.01"
    found = told(k=1)
    found["policy"]["k"] = 1
    assert "1 of the operations is drawn" in said(found)


def test_the_hardest_of_many_classes_come_first() -> None:
    found = told()
    rows = found["per_class"]["classes"]
    found["per_class"]["classes"] = [
        {**rows[0], "name": f"c{place}", "accuracy": {n: accuracy((37 * place % 20) / 20) for n in ("madaug", "none")}}
        for place in range(20)
    ]
    table = next(section for section in report.sections(found) if section.title == "Classes").tables[0]
    assert "the hardest 12" in table.caption and len(table.rows) == 12
    assert [row[0] for row in table.rows] == [f"c{place}" for place in sorted(range(20), key=lambda p: 37 * p % 20)][
        :12
    ]


def test_an_evaluation_tells_the_worst_and_what_may_have_been_seen() -> None:
    rows = {
        "cat": {"images": 1000, "accuracy": 0.5, "low": 0.4, "high": 0.6},
        "dog": {"images": 9, "accuracy": 0.25, "low": 0.1, "high": 0.6},
        "owl": {"images": 0, "accuracy": None, "low": 0.0, "high": 1.0},
    }
    every = {"images": 1009, "accuracy": 0.4983, "low": 0.47, "high": 0.53}
    section = report.evaluated({"net": "wrn-40-2", "all": every, "classes": rows, "shared": []})[0]
    assert section.verdict == [
        "49.8 % of 1,009 images are classified correctly (95 % interval 47.0 % to 53.0 %).",
        "Worst is dog: 25.0 % of 9.",
    ]
    assert [row[0] for row in section.tables[0].rows] == ["dog", "cat"]
    shared = report.evaluated({"net": "wrn-40-2", "all": every, "classes": rows, "shared": ["x.npz", "y.npz"]})[0]
    assert "read x.npz, y.npz too" in shared.verdict[2]


@pytest.mark.parametrize(
    ("select", "accuracies", "epoch"),
    [("last", [0.3, 0.9, 0.4], 2), ("validation", [0.3, 0.9, 0.9], 1), ("validation", [None, None, None], 2)],
)
def test_the_epoch_that_is_tested(select: str, accuracies: list[float | None], epoch: int) -> None:
    one: Any = SimpleNamespace(epochs=[{"val_accuracy": each} for each in accuracies])
    settled = recipe(Config(select=select), "digits")  # type: ignore[arg-type]
    assert kept_epoch(one, settled) == epoch
