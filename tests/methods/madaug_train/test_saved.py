"""Networks and policies on the disk: they come back as they were, and what is damaged is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pomona.errors import CheckFailed, MissingError
from pomona.methods.madaug_train import saved
from pomona.methods.madaug_train.networks import build
from pomona.methods.madaug_train.operations.table import chosen
from pomona.methods.madaug_train.policy import Policy
from pomona.methods.madaug_train.saved import Shape, read_model, read_policy, write_model, write_policy

OPERATIONS = chosen("Rotate,Invert,Cutout")
SHAPE = Shape("cnn-small", 1, 8, 8, ("a", '"<b>é'), (0.25,), (0.5,))


def written(folder: Path, shape: Shape = SHAPE) -> Path:
    """A network and a policy with weights of their own."""
    network = build("cnn-small", shape.channels, 2, 8, 3)
    policy = Policy(48, 3, 1, seed=4)
    folder.mkdir(exist_ok=True)
    write_model(folder, network.state_dict(), shape)
    rows = [{"probability": 1 / 3, "magnitude": 0.5, "strength": 0.1}] * 3
    about = {"k": 2, "jitter": 0.25, "temperature": 1.5, "hidden": 1, "updates": 7}
    write_policy(
        folder, policy.state_dict(), network.state_dict(), shape, operations=OPERATIONS, chosen=rows, about=about
    )
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return written(tmp_path / "run")


def digit(size: tuple[int, int], channels: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(256, size=(4, channels, *size), dtype=np.uint8))


def test_a_network_comes_back(run: Path) -> None:
    found = read_model(run)
    network, images = build("cnn-small", 1, 2, 8, 3).eval(), digit((8, 8), 1)
    torch.testing.assert_close(found.logits(images), network((images / 255 - 0.25) / 0.5))
    assert found.shape == SHAPE and [source["name"] for source in found.sources] == ["config.json", "model.safetensors"]


def test_a_policy_comes_back_with_the_network_that_it_reads(run: Path) -> None:
    (run / "model.safetensors").unlink()  # it stands alone
    (run / "config.json").unlink()
    found, images = read_policy(run / "policy.json"), digit((8, 8), 1)
    logits, magnitudes = Policy(48, 3, 1, seed=4)(
        build("cnn-small", 1, 2, 8, 3).eval().features((images / 255 - 0.25) / 0.5)
    )
    ours = found.outlook(images)
    torch.testing.assert_close(ours[0], logits)
    torch.testing.assert_close(ours[1], magnitudes)
    assert (found.operations, found.k, found.jitter, found.temperature) == (OPERATIONS, 2, 0.25, 1.5)
    assert not any(each.requires_grad for each in [*found.module.parameters(), *found.policy.parameters()])


def test_images_of_another_size_and_kind_are_fitted(run: Path, tmp_path: Path) -> None:
    wide, shape = digit((20, 12), 3), read_policy(run).shape
    grey = wide.float().mean(1).round().to(torch.uint8).numpy()
    small = np.stack([np.asarray(Image.fromarray(each).resize((8, 8), Image.Resampling.BILINEAR)) for each in grey])
    fitted = saved._fitted(wide, shape)[:, 0].numpy()
    assert np.abs(fitted.astype(int) - small).max() <= 1  # Pillow rounds between the two passes
    colour = read_policy(written(tmp_path / "colour", Shape("cnn-small", 3, 8, 8, ("a", "b"), (0.25,) * 3, (0.5,) * 3)))
    one = digit((8, 8), 1)
    for ours, theirs in zip(colour.outlook(one), colour.outlook(one.expand(-1, 3, -1, -1)), strict=True):
        assert torch.equal(ours, theirs)


def test_the_same_policy_gives_the_same_bytes_a_line_for_each_operation(run: Path, tmp_path: Path) -> None:
    again = written(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "policy.json", "policy.safetensors"):
        assert (run / name).read_bytes() == (again / name).read_bytes()
    text = (run / "policy.json").read_text()
    assert [json.loads(line.strip(" ,"))["name"] for line in text.splitlines() if '"name"' in line] == [
        "Rotate",
        "Invert",
        "Cutout",
    ]
    assert json.loads(text)["updates"] == 7 and not any(
        "classifier" in name for name in load_file(run / "policy.safetensors")
    )


def test_a_weight_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    weights = build("cnn-small", 1, 2, 8, 3).state_dict() | {"classifier.bias": torch.tensor([0.0, torch.nan])}
    with pytest.raises(CheckFailed):
        write_model(tmp_path, weights, SHAPE)


def _about(**told: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        about = json.loads((run / "policy.json").read_text())
        (run / "policy.json").write_text(json.dumps({**about, **told}))

    return change


def _network(**told: Any) -> Callable[[Path], None]:
    return lambda run: _about(network={**json.loads((run / "config.json").read_text()), **told})(run)


def _tensor(run: Path) -> None:
    tensors = load_file(run / "policy.safetensors")
    tensors["policy.layers.0.bias"][0] = torch.inf
    save_file(tensors, run / "policy.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        _about(format="another"),
        _about(k=4),
        _about(k=0),
        _about(jitter=2),
        _about(jitter=float("nan")),
        _about(temperature=0),
        _about(hidden=0),
        _about(operations=[{"name": "Rotate"}] * 3),
        _about(operations=[{"name": "Fly"}]),
        _about(operations=3),
        _network(net="wrn-11-1"),
        _network(channels=2),
        _network(std=[0.0]),
        _network(mean=[0.1, 0.2]),
        _network(height=0),
        _network(names=[]),
        _tensor,
        lambda run: (run / "policy.safetensors").unlink(),
        lambda run: (run / "policy.json").unlink(),
        lambda run: (run / "policy.safetensors").write_bytes(b"\x80\x04pickle"),
        lambda run: (run / "policy.json").write_text("["),
    ],
)
def test_a_damaged_policy_is_refused(run: Path, damage: Callable[[Path], None]) -> None:
    damage(run)
    with pytest.raises(MissingError):
        read_policy(run)


def test_a_network_that_is_not_there_or_another_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"config\.json"):
        read_model(tmp_path)
    about = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**about, "names": ["a", "b", "c"]}))
    with pytest.raises(MissingError, match="not those of its configuration"):
        read_model(run)
