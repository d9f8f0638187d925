"""Figures of a run: which are drawn, and of which numbers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pomona.methods.madaug_train import figures
from pomona.methods.madaug_train.figures import Found, draw
from pomona.methods.madaug_train.operations.table import OPERATIONS, chosen
from pomona.methods.madaug_train.table import HISTORY

EVERY = ["accuracy", "curriculum", "strength", "classes", "operations", "per_class", "strips"]


def _metrics(epochs: int, top: float) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "curriculum": epoch / epochs,
            "augmented": epoch / epochs / 2,
            "val_accuracy": top * (epoch + 1) / epochs,
            "train_accuracy": 0.9,
        }
        for epoch in range(epochs)
    ]


def _history(probability: NDArray[Any], strength: NDArray[Any]) -> NDArray[np.float32]:
    """Of (epochs, classes, operations)."""
    found = np.full((*probability.shape, len(HISTORY)), 0.123, dtype=np.float32)
    found[..., HISTORY.index("probability")] = probability
    found[..., HISTORY.index("strength")] = strength
    return found


def _class(name: str, accuracies: Mapping[str, float], images: int = 10) -> dict[str, Any]:
    gains = {other: accuracies["madaug"] - accuracies[other] for other in accuracies if other != "madaug"}
    return {
        "name": name,
        "images": images,
        "accuracy": {contender: {"mean": value} for contender, value in accuracies.items()},
        "gain": {other: {"mean": gain, "low": gain - 0.1, "high": gain + 0.1} for other, gain in gains.items()},
    }


def _found(
    epochs: int = 4,
    classes: int = 3,
    ops: str = "all",
    seeds: int = 2,
    contenders: tuple[str, ...] = ("madaug", "none", "random"),
    name: str = "class",
) -> Found:
    random, operations = np.random.default_rng(0), chosen(ops)
    names = [f"{name} {place}" for place in range(classes)]
    shape = epochs, classes, len(operations)
    raw = random.random((seeds, *shape))
    history = {
        seed: _history(each / each.sum(axis=-1, keepdims=True), random.random(shape)) for seed, each in enumerate(raw)
    }
    moments = ("first", "middle", "last")
    return Found(
        metrics={
            contender: {seed: _metrics(epochs, 0.5 + place / 10 + seed / 100) for seed in range(seeds)}
            for place, contender in enumerate(contenders)
        },
        history=history,
        operations=operations,
        classes=names,
        curriculum="tanh(epoch / 20)",
        per_class={
            "main": "madaug",
            "classes": [_class(each, {who: random.random() for who in ("madaug", *contenders[1:])}) for each in names],
        },
        strips={each: random.integers(0, 256, (min(6, classes), 7, 1, 8, 8), dtype=np.uint8) for each in moments},
        strip_classes=names[:6],
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """What was to be drawn, by stem, instead of figures: positional arguments after it, then the others."""
    found: dict[str, tuple[Any, ...]] = {}
    for name in ("curves", "areas", "heat_maps", "dots", "strips"):
        monkeypatch.setattr(figures, name, lambda stem, *given, **named: found.update({stem.name: (*given, named)}))
    return found


def _texts(path: Path) -> list[str]:
    return [unescape(text) for text in re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))]


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_run_with_a_policy_and_baselines_has_seven_figures_in_both_forms(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw(_found(name="$\\frac$ <b>漢字</b> \x1b[31m"), tmp_path / "figures")
    assert [stem for stem, _ in drawn] == EVERY and all(caption.endswith(".") for _, caption in drawn)
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == sorted(f"{stem}.{kind}" for stem in EVERY for kind in ("png", "svg"))


@pytest.mark.parametrize(("epochs", "classes", "ops"), [(1, 2, "ShearX,Color"), (2, 3, "Invert,Flip"), (3, 100, "all")])
def test_any_run_is_drawn(tmp_path: Path, epochs: int, classes: int, ops: str) -> None:
    contenders = ("madaug", "none", "random", "train+val")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw(_found(epochs, classes, ops, seeds=1, contenders=contenders), tmp_path)
    assert [stem for stem, _ in drawn] == [stem for stem in EVERY if stem != "operations" or ops != "Invert,Flip"]


def test_a_run_without_a_policy_or_rivals_has_its_accuracy(tmp_path: Path) -> None:
    plain = _found(contenders=("none",))
    bare = Found(plain.metrics, {}, OPERATIONS, plain.classes, "", None, {}, [])
    assert [stem for stem, _ in draw(bare, tmp_path)] == ["accuracy"]


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_accuracy_is_the_mean_over_seeds_with_their_range_in_the_order_of_contenders(
    tmp_path: Path, calls: dict[str, tuple[Any, ...]]
) -> None:
    draw(_found(contenders=("madaug", "none", "random", "train+val")), tmp_path)
    _, panels, _ = calls["accuracy"]
    validation, learning = panels
    assert [series.label for series in learning.series] == [
        *("learned policy", "no policy", "random policy", "random policy, all labels")
    ]
    assert len(validation.series) == 3  # what learned from the images of validation is not tested on them
    second = validation.series[1]
    assert (second.low[-1], second.y[-1], second.high[-1]) == pytest.approx((0.6, 0.605, 0.61))
    assert list(second.x) == [0, 1, 2, 3]


def test_one_seed_has_no_band(tmp_path: Path, calls: dict[str, tuple[Any, ...]]) -> None:
    draw(_found(seeds=1), tmp_path)
    assert all(series.low is None for panel in calls["accuracy"][1] for series in panel.series)


def test_the_curriculum_shows_what_was_chosen_and_how_many_were_augmented(tmp_path: Path) -> None:
    # over two classes and two seeds: ShearX 0.1, 0.3, 0.5, 0.7
    first, second = (np.array([[[0.5, 0.5]] * 2, [[p, 1 - p] for p in pair]]) for pair in ((0.1, 0.3), (0.5, 0.7)))
    plain = _found(2, 2, "ShearX,Color")
    strength = np.ones_like(first)
    history = {0: _history(first, strength), 5: _history(second, strength)}
    draw(Found(**{**vars(plain), "history": history}), tmp_path)
    found = _texts(tmp_path / "curriculum.svg")
    assert [text for text in found if text.startswith(("ShearX", "Color"))] == ["Color  60%", "ShearX  40%"]
    assert {"augmented", "tanh(epoch / 20)"} <= set(found)


def test_lines_of_the_curriculum_are_what_was_augmented_and_what_was_planned(
    tmp_path: Path, calls: dict[str, tuple[Any, ...]]
) -> None:
    draw(_found(), tmp_path)
    augmented, planned = calls["curriculum"][-1]["lines"]
    assert list(augmented.y) == pytest.approx([0, 0.125, 0.25, 0.375]) and not augmented.theory
    assert list(planned.y) == pytest.approx([0, 0.25, 0.5, 0.75]) and planned.theory


def test_an_operation_adds_strength_only_where_it_is_chosen(tmp_path: Path, calls: dict[str, tuple[Any, ...]]) -> None:
    # ShearX is strong for the class that never gets it
    probability, strength = np.array([[[1.0, 0.0], [0.0, 1.0]]]), np.array([[[0.0, 1.0], [1.0, 0.6]]])
    found = Found(**{**vars(_found(1, 2, "ShearX,Color")), "history": {0: _history(probability, strength)}})
    draw(found, tmp_path)
    _, _, layers, named = calls["strength"]
    assert layers[0] == ("ShearX", [0.0]) and layers[1][0] == "Color" and layers[1][1] == pytest.approx([0.3])
    assert named["order"] == calls["curriculum"][-1]["order"] == ["ShearX", "Color"]


def test_strength_is_shown_of_operations_with_a_magnitude_the_most_probable_first(
    tmp_path: Path, calls: dict[str, tuple[Any, ...]]
) -> None:
    probability = np.array([[[0.2, 0.5, 0.3]], [[0.1, 0.6, 0.3]]])  # ShearX, Invert, Color
    strength = np.array([[[0.4, 1.0, 0.2]], [[0.8, 1.0, 0.6]]])
    plain = _found(2, 1, "ShearX,Invert,Color")
    draw(Found(**{**vars(plain), "history": {0: _history(probability, strength)}}), tmp_path)
    _, (heat,), named = calls["operations"]
    assert list(heat.row_names) == ["Color, 30%", "ShearX, 10%"] and named["span"] == (0, 1)
    assert np.array(heat.values) == pytest.approx(np.array([[0.2, 0.6], [0.4, 0.8]]))


def test_classes_have_their_own_choice_at_the_end(tmp_path: Path, calls: dict[str, tuple[Any, ...]]) -> None:
    probability = np.array([[[0.5, 0.5], [0.5, 0.5]], [[0.9, 0.1], [0.254, 0.746]]])
    plain = _found(2, 2, "ShearX,Color")
    draw(Found(**{**vars(plain), "history": {0: _history(probability, probability)}}), tmp_path)
    _, (heat,), _ = calls["classes"]
    assert list(heat.row_names) == ["ShearX", "Color"] and list(heat.column_names) == plain.classes
    assert [list(row) for row in heat.values] == [[90, 25], [10, 75]]


def test_classes_come_in_the_order_of_the_best_rival_hardest_first(
    tmp_path: Path, calls: dict[str, tuple[Any, ...]]
) -> None:
    classes = [
        _class("easy", {"madaug": 0.9, "none": 0.2, "random": 0.8, "train+val": 1.0}),
        _class("hard", {"madaug": 0.7, "none": 0.9, "random": 0.1, "train+val": 1.0}, images=1),
        _class("middle", {"madaug": 0.6, "none": 0.3, "random": 0.5, "train+val": 1.0}),
    ]
    draw(Found(**{**vars(_found()), "per_class": {"main": "madaug", "classes": classes}}), tmp_path)
    title, rows, series, named = calls["per_class"]
    assert title.startswith("Learned policy") and rows == ["hard", "middle", "easy"]
    assert [each.label for each in series] == [
        *("over no policy", "over random policy", "over random policy, all labels")
    ]
    assert series[1].values == pytest.approx([60, 10, 10]) and series[0].low == pytest.approx([-30, 20, 60])
    assert named["beside"] == ("accuracy with random policy", ["10%", "50%", "80%"])


def test_of_many_classes_the_hardest_and_the_easiest_are_shown(
    tmp_path: Path, calls: dict[str, tuple[Any, ...]]
) -> None:
    def rows(count: int) -> list[str]:
        classes = [_class(str(place), {"madaug": 0.5, "none": place / count}) for place in reversed(range(count))]
        draw(Found(**{**vars(_found()), "per_class": {"main": "madaug", "classes": classes}}), tmp_path)
        found: list[str] = calls["per_class"][1]
        return found

    assert rows(31) == [str(place) for place in range(31)]
    assert rows(100) == [*map(str, range(15)), "70 between", *map(str, range(85, 100))]
    assert calls["per_class"][2][0].values[15] is None


@pytest.mark.parametrize(
    ("epochs", "titles"),
    [
        (1, ["at the end"]),
        (2, ["after the first epoch", "at the end"]),
        (3, ["after the first epoch", "half way", "at the end"]),
    ],
)
def test_strips_of_the_same_epoch_are_shown_once(
    tmp_path: Path, calls: dict[str, tuple[Any, ...]], epochs: int, titles: list[str]
) -> None:
    found = _found(epochs)
    draw(found, tmp_path)
    _, groups, names, _ = calls["strips"]
    assert [title for title, _ in groups] == ["original", *titles] and names == found.strip_classes
    originals, last = groups[0][1], groups[-1][1]
    assert np.array_equal(np.concatenate([originals, last], axis=1), found.strips["last"])


def test_strips_stand_in_the_order_of_the_classes(tmp_path: Path, calls: dict[str, tuple[Any, ...]]) -> None:
    plain = _found()
    draw(Found(**{**vars(plain), "strip_classes": ["class 2", "class 0", "class 1"]}), tmp_path)
    _, groups, names, _ = calls["strips"]
    assert names == plain.classes
    assert np.array_equal(groups[-1][1], plain.strips["last"][[1, 2, 0], 1:])
