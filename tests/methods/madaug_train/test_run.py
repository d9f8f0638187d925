"""The whole method: what a run tells is what its files, read by others, hold."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, recall_score
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, cross_entropy

from methods.madaug_train.running import execute
from pomona.errors import CheckFailed, UsageError
from pomona.methods.madaug_train.config import Config
from pomona.methods.madaug_train.data import Inputs, Prepared, open_prepared
from pomona.methods.madaug_train.splits import parts
from pomona.runtime.progress import Quiet
from pomona.runtime.settings import Settings

EPOCHS = 4
FOUR = "TranslateX,Invert,Solarize,Identity"


def config(**told: Any) -> Config:
    usual: dict[str, Any] = {"epochs": EPOCHS, "ops": FOUR, "policy_lr": 0.05, "tau": 2.0}
    return Config(**{**usual, **told})


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two seeds, of which the best epoch in validation is kept: as the step size rises, not the last."""
    place = tmp_path_factory.mktemp("learned") / "run"
    rising = {"lr": 1.0, "min_lr": 1.0, "warmup_epochs": EPOCHS - 1}
    chosen = config(select="validation", compare="none,train+val", seeds=2, **rising)
    return place, execute(config=chosen, output=place)[0]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("digits")
    Inputs(Config(), Settings(), ()).prepare(folder, Quiet())
    return open_prepared(folder)


@pytest.fixture(scope="module")
def given(learned: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    place = tmp_path_factory.mktemp("given") / "run"
    chosen = config(epochs=1, k=1, policy=learned[0], compare="nothing")
    return place, execute(config=chosen, output=place, seed=7)[0]


def told(place: Path, name: str = "report.json") -> Any:
    return json.loads((place / name).read_text())


def rows(place: Path, train: str, seed: int) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return [row for row in every if (row["train"], row["seed"]) == (train, seed)]


def best(place: Path, train: str, seed: int) -> int:
    return int(np.argmax([row["val_accuracy"] for row in rows(place, train, seed)]))


def features(weights: dict[str, Tensor], about: dict[str, Any], images: Any) -> Tensor:
    """What cnn-small makes of grey images, in double precision, by torch's functions."""
    x = torch.from_numpy((np.asarray(images) / 255 - about["mean"][0]) / about["std"][0])
    for place, stride in enumerate((1, 2, 1)):
        norm = {name: weights[f"norms.{place}.{name}"].double() for name in ("running_mean", "running_var")}
        scale, shift = (weights[f"norms.{place}.{name}"].double() for name in ("weight", "bias"))
        x = conv2d(x, weights[f"convolutions.{place}.weight"].double(), stride=stride, padding=1)
        x = batch_norm(x, norm["running_mean"], norm["running_var"], scale, shift).relu()
    return x.mean((2, 3))


def logits(place: Path, images: Any) -> Tensor:
    weights = load_file(place / "model.safetensors")
    found = features(weights, told(place, "config.json"), images)
    return found @ weights["classifier.weight"].double().T + weights["classifier.bias"].double()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_network_that_is_kept_has_the_accuracy_that_is_told(
    learned: tuple[Path, Any], digits: Prepared, seed: int
) -> None:
    place = learned[0] if seed == 0 else learned[0] / "seeds" / "1"
    divided = parts(digits, digits.options, seed=seed)
    found = logits(place, digits.images)
    predicted = found.argmax(1).numpy()
    accuracy = accuracy_score(digits.labels[divided.test], predicted[divided.test])
    assert told(learned[0])["accuracy"]["madaug"]["by_seed"][seed] == pytest.approx(accuracy, abs=1e-12)
    row = rows(learned[0], "madaug", seed)[best(learned[0], "madaug", seed)]
    assert row["val_accuracy"] == accuracy_score(digits.labels[divided.val], predicted[divided.val])
    loss = cross_entropy(found[divided.val], torch.from_numpy(digits.labels[divided.val]))
    assert row["val_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_best_epoch_is_not_the_last_here(learned: tuple[Path, Any]) -> None:
    place = learned[0]
    after = told(place)["tested_after_epoch"]
    assert after["madaug"] == [best(place, "madaug", seed) for seed in (0, 1)]
    assert EPOCHS - 1 not in after["madaug"]
    assert after["train+val"] == [EPOCHS - 1] * 2


@pytest.mark.parametrize("seed", [0, 1])
def test_a_policy_file_tells_of_the_weights_beside_it(learned: tuple[Path, Any], digits: Prepared, seed: int) -> None:
    place = learned[0] if seed == 0 else learned[0] / "seeds" / "1"
    about, weights = told(place, "policy.json"), load_file(place / "policy.safetensors")
    train = parts(digits, digits.options, seed=seed).train
    network = {name.removeprefix("network."): value for name, value in weights.items()}
    found = features(network, about["network"], digits.images[train])
    found = found @ weights["policy.layers.0.weight"].double().T + weights["policy.layers.0.bias"].double()
    lam, p = found[:, :4].sigmoid(), found[:, 4:].softmax(1)
    strength = torch.stack([(2 * lam[:, 0] - 1).abs(), p[:, 0] ** 0, 1 - lam[:, 2], 0 * p[:, 0]], 1)
    labels = digits.labels[train]
    for name, values in (("probability", p), ("magnitude", lam), ("strength", strength)):
        mean = np.mean([values.numpy()[labels == label].mean(0) for label in range(10)], 0)
        np.testing.assert_allclose([row[name] for row in about["operations"]], mean, atol=1e-6)
    row = rows(learned[0], "madaug", seed)[best(learned[0], "madaug", seed)]
    assert about["updates"] == row["policy_updates"]
    entropy = float(-(p * p.log()).sum(1).mean()) / math.log(4)
    assert told(learned[0])["policy"]["entropy"][seed] == pytest.approx(entropy, abs=1e-6)
    model = place / "model.safetensors"
    assert about["model_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()


def test_the_history_holds_what_the_policy_file_says_of_its_epoch(learned: tuple[Path, Any]) -> None:
    table = pd.read_parquet(learned[0] / "policy_history.parquet")
    assert len(table) == 2 * EPOCHS * 10 * 4
    chosen = table[(table["seed"] == 0) & (table["epoch"] == best(learned[0], "madaug", 0))]
    mean = chosen.groupby("operation")["probability"].mean()
    for row in told(learned[0], "policy.json")["operations"]:
        assert mean[row["name"]] == pytest.approx(row["probability"], abs=1e-6)


def test_classes_gain_what_their_accuracies_differ_by(learned: tuple[Path, Any], digits: Prepared) -> None:
    place, found = learned[0], told(learned[0], "per_class.json")
    right, tested = np.zeros(10), np.zeros(10)
    for seed, folder in ((0, place), (1, place / "seeds" / "1")):
        test = parts(digits, digits.options, seed=seed).test
        labels = digits.labels[test]
        recall = recall_score(labels, logits(folder, digits.images[test]).argmax(1).numpy(), average=None)
        right, tested = right + recall * np.bincount(labels), tested + np.bincount(labels)
    ours = [row["accuracy"]["madaug"]["mean"] for row in found["classes"]]
    np.testing.assert_allclose(ours, right / tested, atol=1e-12)
    for other in ("none", "train+val"):
        theirs = [row["accuracy"][other]["mean"] for row in found["classes"]]
        gains = np.subtract(ours, theirs)
        np.testing.assert_allclose([row["gain"][other]["mean"] for row in found["classes"]], gains, atol=1e-12)
        against = found["against"][other]
        assert against["hardest_class_gain"] == pytest.approx(gains[np.argmin(np.add(ours, theirs))])
        assert (against["gaining"], against["losing"]) == ((gains > 0).sum(), (gains < 0).sum())
        assert learned[1]["worst_class_gain"][other] == pytest.approx(against["hardest_class_gain"], abs=1e-6)


def test_the_summary_says_what_the_report_does(learned: tuple[Path, Any]) -> None:
    place, summary = learned
    report = told(place)
    assert summary["images"] == sum(report["images"][part] for part in ("train", "val", "test", "unused")) == 1797
    assert summary["policy_updates"] == sum(report["policy"]["updates"]) == 2 * EPOCHS * 4
    for name, row in report["accuracy"].items():
        assert summary["accuracy"][name]["mean"] == pytest.approx(np.mean(row["by_seed"]), abs=1e-6)
        assert summary["accuracy"][name]["sd"] == pytest.approx(np.std(row["by_seed"], ddof=1), abs=1e-6)
    first = max(report["policy"]["operations"], key=lambda row: row["probability"])
    assert next(iter(summary["top_ops"])) == first["name"]
    assert report["labels"] == {"madaug": 400, "none": 400, "train+val": 400}  # an epoch is chosen by labels too


def test_the_manifest_knows_every_file(learned: tuple[Path, Any]) -> None:
    files = told(learned[0], "manifest.json")["files"]
    there = {str(path.relative_to(learned[0])) for path in learned[0].rglob("*") if path.is_file()}
    assert there - {"manifest.json"} == set(files)
    for name, entry in files.items():
        assert hashlib.sha256((learned[0] / name).read_bytes()).hexdigest() == entry["sha256"]


def test_curriculum_and_step_size_are_those_of_the_formulas(learned: tuple[Path, Any]) -> None:
    for row in rows(learned[0], "madaug", 1):
        assert row["curriculum"] == pytest.approx(math.tanh(row["epoch"] / 2))
        assert row["lr"] == pytest.approx(min((row["epoch"] + 1) / (EPOCHS - 1), 1))
    assert all(row["curriculum"] == row["augmented"] == 0 for row in rows(learned[0], "none", 1))


def test_a_policy_that_is_given_is_told_with_what_it_does(given: tuple[Path, Any], learned: tuple[Path, Any]) -> None:
    place, summary = given
    assert summary["policy_updates"] == 0 and list(summary["accuracy"]) == ["transfer"]
    assert told(place)["policy"]["k"] == told(learned[0], "policy.json")["k"] == 2
    assert told(place)["labels"] == {"transfer": 200} and told(place)["seeds"] == [7]
    assert not (place / "policy.json").exists()
    text = (place / "report.md").read_text()
    assert "policy.json" not in text and "then 2 of the operations are drawn" in text and "source network's" in text


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_training_whose_policy_would_never_move_is_refused(tmp_path: Path, dry_run: bool) -> None:
    chosen = config(epochs=3, policy_start=2, policy_every=12)
    with pytest.raises(CheckFailed, match="0 policy updates would be made: none of the 12 steps"):
        execute(config=chosen, output=tmp_path / "run", dry_run=dry_run)
    assert not list(tmp_path.iterdir())
    reached = execute(config=config(epochs=3, policy_start=2, policy_every=11), dry_run=True)[0]  # step 11 of 12
    assert reached["train"] == 200


def test_options_that_cannot_come_to_anything_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="0 policy updates") as raised:
        execute(config=config(policy_start=999), output=tmp_path / "run")
    assert raised.value.exit_code == 9
    with pytest.raises(UsageError, match="--k 5"):
        execute(config=config(k=5), output=tmp_path / "run")
    with pytest.raises(UsageError, match="-o DIR"):
        execute(config=config())


def test_an_accuracy_below_the_bound_fails_afterwards(tmp_path: Path) -> None:
    chosen = config(epochs=1, augment="none", compare="nothing", fail_under=0.99)
    with pytest.raises(CheckFailed, match=r"below --fail-under 0\.99"):
        execute(config=chosen, output=tmp_path / "run")
    assert told(tmp_path / "run")["policy"] is None
    assert "Policy" not in (tmp_path / "run" / "report.md").read_text()


def test_images_that_another_part_holds_too_are_counted_in_the_summary(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = random.integers(256, size=(40, 8, 8), dtype=np.uint8)
    labels = np.arange(40) % 2
    twice = {"x_train": images[:30], "y_train": labels[:30], "x_test": images[28:], "y_test": labels[28:]}
    np.savez(tmp_path / "images.npz", **twice)
    chosen = config(preset="digits", epochs=1, overlap="drop", augment="none", compare="nothing")
    summary, code = execute(str(tmp_path / "images.npz"), config=chosen, output=tmp_path / "run")
    assert code == 0 and summary["images"] == 42 and summary["rejected"] == 0
    assert summary["parts"] == {"train": 22, "val": 6, "test": 12, "unused": 0, "dropped": 2}
