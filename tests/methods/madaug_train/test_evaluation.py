"""--evaluate: the accuracy of a network that was kept, on images that are brought."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from methods.madaug_train.running import execute
from pomona.errors import CheckFailed, DataError, MissingError
from pomona.methods.madaug_train.config import Config
from pomona.methods.madaug_train.networks import build
from pomona.methods.madaug_train.saved import Shape, write_model

NAMES = ("a", "b", "never")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    write_model(
        folder, build("cnn-small", 1, 3, 8, 5).state_dict(), Shape("cnn-small", 1, 8, 8, NAMES, (0.5,), (0.25,))
    )
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    random = np.random.default_rng(1)
    pixels = random.integers(256, size=(90, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "some.npz", image=pixels, label=np.array(NAMES[:2])[random.integers(2, size=90)])
    return tmp_path / "some.npz"


def evaluated(
    network: Path, *inputs: Path | str, output: Path | None = None, **told: Any
) -> tuple[dict[str, Any], int]:
    return execute(*map(str, inputs), config=Config(evaluate=network, **told), output=output)


def test_accuracies_and_intervals_are_those_of_the_answers(network: Path, images: Path, tmp_path: Path) -> None:
    summary, code = evaluated(network, images, output=tmp_path / "run")
    data = np.load(images)
    x = (torch.from_numpy(data["image"])[:, None] / 255 - 0.5) / 0.25
    chances = build("cnn-small", 1, 3, 8, 5).eval()(x).softmax(1)
    predicted = np.array(NAMES)[chances.argmax(1).numpy()]
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [row["predicted"] for row in rows] == predicted.tolist()
    np.testing.assert_allclose([row["probability"] for row in rows], chances.max(1).values.detach(), atol=1e-5)
    right = predicted == data["label"]
    interval = binomtest(int(right.sum()), 90).proportion_ci(0.95, "wilson")
    assert code == 0 and summary["images"] == 90
    assert summary["accuracy"] == pytest.approx(right.mean(), abs=1e-6)
    assert summary["ci"] == pytest.approx([interval.low, interval.high], abs=1e-6)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for name in NAMES[:2]:
        assert report["classes"][name]["accuracy"] == right[data["label"] == name].mean()
        assert report["classes"][name]["images"] == (data["label"] == name).sum()
    assert report["classes"]["never"]["accuracy"] is None and report["shared"] == []
    worst = min(NAMES[:2], key=lambda name: report["classes"][name]["accuracy"])
    assert summary["worst_class"]["name"] == worst


def test_labels_that_the_network_does_not_know_are_refused(network: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", image=np.zeros((2, 8, 8), np.uint8), label=np.array(["a", "other"]))
    with pytest.raises(DataError, match='does not know the label "other"'):
        evaluated(network, tmp_path / "other.npz")
    np.savez(tmp_path / "bare.npz", image=np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(DataError, match="no labels"):
        evaluated(network, tmp_path / "bare.npz")
    with pytest.raises(MissingError):
        evaluated(tmp_path, tmp_path / "other.npz")


def test_an_accuracy_below_the_bound_fails(network: Path, images: Path) -> None:
    assert evaluated(network, images, fail_under=0.0)[1] == 0
    with pytest.raises(CheckFailed, match="below --fail-under 1"):
        evaluated(network, images, fail_under=1.0)


def test_images_that_the_run_may_have_learned_from_are_told(network: Path, images: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other.npz"
    chosen = Config(preset="digits", epochs=1, augment="none", compare="nothing", test=str(other))
    data = np.load(images)
    np.savez(other, image=255 - data["image"], label=data["label"])
    execute(str(images), config=chosen, output=run)
    for place, told in ((images, ["some.npz"]), (other, [])):
        evaluated(run, place, output=tmp_path / "tested")
        report = json.loads((tmp_path / "tested" / "report.json").read_text())
        assert report["shared"] == told
        assert ("some.npz too" in (tmp_path / "tested" / "report.md").read_text()) == bool(told)
        shutil.rmtree(tmp_path / "tested")
