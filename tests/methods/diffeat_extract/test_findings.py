"""What the papers say of diffusion features, found again on real digits by the command itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from methods.diffeat_extract.running import execute
from pomona.methods.diffeat_extract.config import Config


def accuracies(output: Path) -> dict[tuple[str, str], float]:
    """Mean accuracy in percent by what was probed and the number of labels."""
    rows = json.loads((output / "report.json").read_bytes())["probe"]["rows"]
    return {(row["kind"], row["shots"]): 100 * row["mean"] for row in rows}


def test_b5_and_b6_after_400_steps_features_beat_pixels_and_random_weights(tmp_path: Path) -> None:
    made, _, _ = execute("builtin:digits", config=Config(train_model=400), output=tmp_path / "model")
    losses = json.loads((tmp_path / "model/manifest.json").read_bytes())["results"]["losses"]
    assert 0.10 <= sum(losses[-2:]) / 2 <= 0.12 and made["images"] == 898
    config = Config(block=("u0r0",), timestep=(50,), pool=(4,), probe="linear", shots="10")
    model = str(tmp_path / "model")
    execute("builtin:digits", config=config, model=model, dtype="float32", output=tmp_path / "out")
    found = accuracies(tmp_path / "out")
    assert found["features", "10"] >= 90.0
    assert found["pixels", "10"] == pytest.approx(88.5, abs=1)
    assert found["random", "10"] == pytest.approx(86.4, abs=2)
    assert found["features", "10"] - found["random", "10"] >= 3


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Accuracies of the embedded model at some times."""

    def at(timestep: int, shots: str = "10") -> dict[tuple[str, str], float]:
        output = tmp_path_factory.mktemp("runs") / f"t{timestep}"
        config = Config(timestep=(timestep,), probe="linear", shots=shots)
        execute("builtin:digits", config=config, dtype="float32", output=output)
        return accuracies(output)

    return at


@pytest.mark.slow
def test_b7_the_embedded_model_needs_a_tenth_of_the_labels(shipped: Any) -> None:
    found = shipped(50, "1,10,all")
    assert found["features", "10"] >= 93.3 and found["features", "1"] >= 78 and found["features", "all"] >= 97
    assert found["features", "10"] - found["pixels", "10"] >= 4.5
    assert found["features", "1"] - found["pixels", "1"] >= 20


@pytest.mark.slow
def test_b8_little_noise_is_best_and_much_leaves_nothing(shipped: Any) -> None:
    found = {timestep: shipped(timestep)["features", "10"] for timestep in (0, 50, 200, 500)}
    print({timestep: round(value, 1) for timestep, value in found.items()})
    assert found[50] >= found[0] and found[200] <= found[50] - 5 and found[500] <= 25


@pytest.mark.slow
@pytest.mark.parametrize("head", ["difformer", "diffeed"])
def test_the_successors_heads_learn_digits_through_the_command(tmp_path: Path, head: Any) -> None:
    """Few labels are not what they are for; with all of them they are about as good as the linear probe."""
    config = Config(head=head, shots="all", controls="pixels")
    summary, _, _ = execute("builtin:digits", config=config, dtype="float32", output=tmp_path / "out")
    assert summary["probe"]["accuracy"] > 0.95
