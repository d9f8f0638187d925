"""Networks and policies read back, honest ones and others."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pomona.errors import MissingError
from pomona.methods.madaug_train.operations.table import chosen
from pomona.methods.madaug_train.policy import Policy
from pomona.methods.madaug_train.saved import Shape, read_model, read_policy, write_model, write_policy

SHAPE = Shape("cnn-small", 1, 8, 9, ("a", "b"), (0.3,), (0.4,))
OPERATIONS = chosen("Invert,Cutout,Flip")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A network and a policy of it, as a run leaves them."""
    network = SHAPE.build()
    write_model(tmp_path, network.state_dict(), SHAPE)
    write_policy(
        tmp_path,
        Policy(network.width, 3, 1).state_dict(),
        network.state_dict(),
        SHAPE,
        operations=OPERATIONS,
        chosen=[{}, {}, {}],
        about={"k": 2, "jitter": 0.3, "temperature": 1e9, "hidden": 1, "updates": 4},
    )
    return tmp_path


def test_a_policy_is_read_as_it_was_written(folder: Path) -> None:
    found = read_policy(folder)
    assert (found.operations, found.k, found.jitter, found.temperature) == (OPERATIONS, 2, 0.3, 1e9)
    images = torch.arange(2 * 72, dtype=torch.uint8).reshape(2, 1, 8, 9)
    normalised = (images / 255 - 0.3) / 0.4
    network = SHAPE.build().eval()
    with torch.no_grad():
        logits, magnitudes = Policy(network.width, 3, 1)(network.features(normalised))
    for ours, theirs in zip(found.outlook(images), (logits, magnitudes), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


_IMPOSSIBLE: list[tuple[bool, str, Any]] = [
    *((False, "hidden", value) for value in (10**9, -1)),
    *((False, "k", value) for value in (4, 1e999)),
    *((True, "net", value) for value in ("wrn-994-99", 5)),
    *((True, "height", value) for value in (10**12, 8.5, "9")),
    *((True, "std", [value]) for value in (1e-320, 10**400, float("nan"))),
    *((False, "temperature", 1e999), (True, "channels", 2), (True, "names", ["a", "a"])),
]


@pytest.mark.parametrize(("inside", "name", "value"), _IMPOSSIBLE)
def test_a_policy_that_asks_for_the_impossible_is_refused_before_anything_is_made_of_it(
    folder: Path, inside: bool, name: str, value: Any
) -> None:
    about = json.loads((folder / "policy.json").read_text())
    (about["network"] if inside else about)[name] = value
    (folder / "policy.json").write_text(json.dumps(about))
    with pytest.raises(MissingError):
        read_policy(folder)


def _negative(tensors: dict[str, torch.Tensor]) -> None:
    tensors["network.norms.0.running_var"].neg_()


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["policy.layers.0.bias"][1] = float("nan")


def _short(tensors: dict[str, torch.Tensor]) -> None:
    tensors["policy.layers.2.weight"] = tensors["policy.layers.2.weight"][:4].clone()


def _doubled(tensors: dict[str, torch.Tensor]) -> None:
    tensors["policy.layers.0.bias"] = tensors["policy.layers.0.bias"].double()


@pytest.mark.parametrize("damage", [_negative, _nan, _short, _doubled])
def test_a_policy_with_other_weights_than_it_says_or_none_that_work_is_refused(
    folder: Path, damage: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    tensors = load_file(folder / "policy.safetensors")
    damage(tensors)
    save_file(tensors, folder / "policy.safetensors")
    with pytest.raises(MissingError, match=r"not finite|not those of its configuration"):
        read_policy(folder)


def test_a_pickle_is_not_loaded(folder: Path) -> None:
    for name in ("policy.safetensors", "model.safetensors"):
        (folder / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(MissingError, match="damaged"):
        read_policy(folder)
    with pytest.raises(MissingError, match="damaged"):
        read_model(folder)
