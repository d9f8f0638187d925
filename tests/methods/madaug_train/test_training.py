"""Training: its steps are those of a plain loop, and nothing but the arguments shows in a bit of the result."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from methods.madaug_train.trainings import (
    BATCHES,
    EPOCHS,
    LAUNCHED,
    STEPS,
    prepared,
    runtime,
    same,
    settled,
)
from methods.madaug_train.trainings import trained as train_on
from pomona.errors import CheckFailed, MissingError, OutputError, UsageError
from pomona.methods.madaug_train import course
from pomona.methods.madaug_train.data import open_prepared
from pomona.methods.madaug_train.hypergradient import policy_step
from pomona.methods.madaug_train.networks import build
from pomona.methods.madaug_train.operations import by_pillow
from pomona.methods.madaug_train.operations.batched import Chain
from pomona.methods.madaug_train.operations.table import chosen
from pomona.methods.madaug_train.policy import Policy
from pomona.methods.madaug_train.sampling import STREAMS, chain, uniform_chain
from pomona.methods.madaug_train.saved import Shape, write_model, write_policy
from pomona.methods.madaug_train.splits import parts
from pomona.methods.madaug_train.training import Trained
from pomona.runtime.seeds import derive
from stopping import Stop, Stopping

CONTENDERS = ("madaug", "random", "uniform", "none", "train+val")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("digits") / "data")


@pytest.fixture(scope="module")
def whole(data: Path) -> Trained:
    """Nine steps without a break."""
    return train_on(data)


@pytest.fixture
def trained(data: Path) -> Callable[..., Trained]:
    return lambda contender="madaug", **told: train_on(data, contender, **told)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is written after each step."""
    monkeypatch.setattr(course, "_EVERY", 0.0)


# --- what a training does --------------------------------------------------------------------------------------------


def drawn(name: str, step: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=derive(0, f"{name}/{step}")))


def rate(step: int, batches: int) -> float:
    """A warm-up of one epoch to 0.1, then half a cosine to nothing."""
    if step < batches:
        return 0.1 * (step + 1) / batches
    return 0.05 * (1 + math.cos(math.pi * (step - batches) / ((EPOCHS - 1) * batches)))


def by_itself(data: Path, contender: str) -> tuple[nn.Module, nn.Module, list[list[float]]]:
    """The network, the policy, and loss, share right, share augmented and policy gradient of each epoch, by a plain
    loop: torch's own batch norm, clipping and optimisers, Pillow's operations, one image's chain at a time."""
    recipe, images = settled(), open_prepared(data)
    divided = parts(images, images.options, seed=0)
    mean, std = divided.mean[0], divided.std[0]
    x, y = torch.from_numpy(images.images[:].copy()), torch.from_numpy(images.labels)
    scaled = ((x / 255).double() - mean) / std
    network = build("cnn-small", 1, 10, 8, 0)
    operations = chosen(recipe.ops)
    policy = Policy(48, 4, 0, seed=0)
    sgd = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-2, foreach=False)
    adam = torch.optim.Adam(policy.parameters(), recipe.policy_lr, weight_decay=1e-2, foreach=False)
    snapshot, epochs = network, []
    places = np.concatenate([divided.train, divided.val]) if contender == "train+val" else divided.train
    batches = -(-len(places) // 8)
    for step in range(EPOCHS * batches):
        epoch, number = divmod(step, batches)
        if number == 0:
            order = np.random.Generator(np.random.Philox(key=derive(0, f"order/{epoch}"))).permutation(len(places))
            epochs.append([0.0, 0.0, 0.0, 0.0])
        batch = places[order[8 * number : 8 * number + 8]]
        buffers = [sgd.state.get(each, {}).get("momentum_buffer") for each in network.parameters()]
        if contender == "madaug" and step % 2 == 0:
            flat = [torch.zeros_like(w) if m is None else m for w, m in zip(network.parameters(), buffers, strict=True)]
            outer = drawn("validation", step).choice(divided.val, 5, replace=False)
            epochs[-1][3] += policy_step(
                network,
                policy,
                torch.cat([each.flatten() for each in flat]),
                *(x[batch[:3]], y[batch[:3]], x[outer], y[outer]),
                recipe=recipe,
                lr=rate(step, batches),
                operations=operations,
                backend=by_pillow,
                randoms={name: drawn(f"policy/{name}", step) for name in STREAMS},
                mean=divided.mean,
                std=divided.std,
                optimiser=adam,
            )
            snapshot = copy.deepcopy(network).eval()
        coin = drawn("coin", step).random(len(batch)) < min(math.tanh(epoch) + 0.2, 1) * (contender != "none")
        seen = scaled[batch].clone()
        if coin.any():
            randoms = {name: drawn(name, step) for name in STREAMS}
            outlook = torch.zeros(int(coin.sum()), 4), torch.full((int(coin.sum()), 4), 0.5)
            if contender == "madaug":
                with torch.no_grad():
                    outlook = policy(snapshot.features(scaled[batch[coin]].float()))
            if contender == "uniform":
                done = uniform_chain(int(coin.sum()), 4, 2, randoms)
            else:
                done = chain(*outlook, k=2, temperature=1.0, jitter=0.3, randoms=randoms)
            for row, place in enumerate(np.flatnonzero(coin)):
                one = Chain(done.operations[[row]], done.magnitudes[[row]], done.mirrored[[row]], done.centres[[row]])
                pixels = by_pillow.augmented(x[batch[[place]]], operations, one)
                seen[place] = (pixels[0].double() / 255 - mean) / std
        logits = network.train()(seen.float())
        loss = cross_entropy(logits, y[batch], label_smoothing=0.1)
        sgd.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        sgd.param_groups[0]["lr"] = rate(step, batches)
        sgd.step()
        for column, value in enumerate((loss.item() * len(batch), (logits.argmax(1) == y[batch]).sum(), coin.sum())):
            epochs[-1][column] += float(value) / len(places)
    return network, policy, epochs


@pytest.mark.parametrize("contender", CONTENDERS)
def test_the_steps_are_those_of_a_plain_loop(data: Path, whole: Trained, contender: str) -> None:
    ours = whole if contender == "madaug" else train_on(data, contender)
    network, policy, epochs = by_itself(data, contender)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(ours.network[name], value, atol=2e-5, rtol=1e-3)
    told = ("train_loss", "train_accuracy", "augmented")
    for row, expected in zip(ours.epochs, epochs, strict=True):
        assert [row[name] for name in told] == pytest.approx(expected[:3], abs=1e-4)
    if contender != "madaug":
        assert ours.policy is None and ours.updates == 0 and not ours.strips and ours.history.size == 0
        assert {row["hypergradient_norm"] for row in ours.epochs} == {None}
        return
    assert ours.policy is not None and ours.updates == 5
    for name, value in policy.state_dict().items():
        torch.testing.assert_close(ours.policy[name], value, atol=2e-5, rtol=1e-3)
    moved = [2, 3, 5]
    assert [row["policy_updates"] for row in ours.epochs] == moved
    norms = [total / count for (*_, total), count in zip(epochs, np.diff([0, *moved]), strict=True)]
    assert [row["hypergradient_norm"] for row in ours.epochs] == pytest.approx(norms, rel=1e-3)


def test_what_is_told_of_an_epoch_is_so(data: Path, whole: Trained) -> None:
    """The last row and the predictions, by the network that was given back."""
    images = open_prepared(data)
    divided = parts(images, images.options, seed=0)
    network = build("cnn-small", 1, 10, 8, 7).eval()
    network.load_state_dict(whole.network)
    scaled = (torch.from_numpy(images.images[:].copy()) / 255 - divided.mean[0]) / divided.std[0]
    with torch.no_grad():
        logits = network(scaled)
    val, labels = divided.val, torch.from_numpy(images.labels)
    last = whole.epochs[-1]
    assert last["val_loss"] == pytest.approx(cross_entropy(logits[val], labels[val]).item(), rel=1e-4)
    assert last["val_accuracy"] == (logits[val].argmax(1) == labels[val]).double().mean().item()
    assert np.array_equal(whole.predictions, logits[divided.test].argmax(1).numpy())
    assert whole.predictions.dtype == np.int64
    assert whole.parts == {"train": 22, "val": 20, "test": 1755, "unused": 0}
    assert (whole.mean, whole.std) == (divided.mean, divided.std)
    assert [row["epoch"] for row in whole.epochs] == [0, 1, 2]
    assert [row["lr"] for row in whole.epochs] == [rate(3 * epoch + 2, BATCHES) for epoch in range(EPOCHS)]
    assert [row["curriculum"] for row in whole.epochs] == [min(math.tanh(epoch) + 0.2, 1) for epoch in range(EPOCHS)]


def test_validation_images_that_are_learned_from_judge_nothing(trained: Callable[..., Trained]) -> None:
    found = trained("train+val", select="validation", epochs=2)
    assert {(row["val_loss"], row["val_accuracy"]) for row in found.epochs} == {(None, None)}
    assert same(found, trained("train+val", epochs=2))


@pytest.mark.usefixtures("always")
def test_weights_of_the_best_epoch_are_tested_when_asked_for(trained: Callable[..., Trained], tmp_path: Path) -> None:
    """As the state was at the end of that epoch."""
    last = trained(epochs=6, lr=0.3)
    accuracies = [row["val_accuracy"] for row in last.epochs]
    best = accuracies.index(max(accuracies))
    assert best < 5, "the last epoch is the best: it shows nothing"
    with pytest.raises(Stop):
        trained(epochs=6, lr=0.3, checkpoint=tmp_path / "state", progress=Stopping(BATCHES * (best + 1)))
    then = load_file(tmp_path / "state")
    found = trained(epochs=6, lr=0.3, select="validation")
    assert found.epochs == last.epochs and found.policy is not None
    ours = {name: torch.cat([found.network[each].flatten() for each in names]) for name, names in named().items()}
    assert all(torch.equal(ours[name], then[name]) for name in ours)
    assert torch.equal(torch.cat([value.flatten() for value in found.policy.values()]), then["policy"])
    assert not all(torch.equal(found.network[name], value) for name, value in last.network.items())


def named() -> dict[str, list[str]]:
    """Names of the tensors of the network in the vectors of a state."""
    network = build("cnn-small", 1, 10, 8, 0)
    return {
        "weights": [name for name, _ in network.named_parameters()],
        "statistics": [name for name, _ in network.named_buffers()],
    }


def test_the_history_is_how_the_policy_sees_the_images_to_learn_from(data: Path, whole: Trained) -> None:
    images = open_prepared(data)
    divided = parts(images, images.options, seed=0)
    network, policy = build("cnn-small", 1, 10, 8, 0).eval(), Policy(48, 4)
    assert whole.history.shape == (EPOCHS, 10, 4, 6) and np.isfinite(whole.history).all()
    network.load_state_dict(whole.network)
    policy.load_state_dict(whole.policy or {})
    x = torch.from_numpy(images.images[divided.train])
    labels = images.labels[divided.train]
    with torch.no_grad():
        logits, magnitudes = policy(network.features((x / 255 - divided.mean[0]) / divided.std[0]))
    p, lam = logits.double().softmax(1).numpy(), magnitudes.double().numpy()
    strength = np.stack([abs(2 * lam[:, 0] - 1), np.ones(22), abs(2 * lam[:, 2] - 1), lam[:, 3]], 1)
    for label in range(10):
        own = labels == label
        expected = [f(each[own], axis=0) for each in (p, lam, strength) for f in (np.mean, np.std)]
        np.testing.assert_allclose(whole.history[-1, label], np.stack(expected, 1), atol=1e-5)
    entropy = -(p * np.log(p)).sum(1).mean() / np.log(4)
    assert whole.epochs[-1]["entropy"] == pytest.approx(entropy, rel=1e-5)
    assert whole.epochs[-1]["strength"] == pytest.approx((p * strength).sum(1).mean(), rel=1e-5)


def test_strips_are_images_of_six_classes_and_what_the_policy_makes_of_them(data: Path, whole: Trained) -> None:
    images = open_prepared(data)
    train = parts(images, images.options, seed=0).train
    assert list(whole.strips) == ["first", "middle", "last"]
    for strip in whole.strips.values():
        assert strip.shape == (6, 7, 1, 8, 8) and strip.dtype == np.uint8
        assert np.array_equal(strip[:, 0], whole.strips["first"][:, 0])
    found = [np.flatnonzero((images.images[train] == shown).all((1, 2, 3))) for shown in whole.strips["last"][:, 0]]
    assert all(len(places) == 1 for places in found)
    assert [int(images.labels[train[places[0]]]) for places in found] == whole.shown
    assert len(set(whole.shown)) == 6
    changed = (whole.strips["last"][:, 1:] != whole.strips["last"][:, :1]).any((2, 3, 4))
    assert changed.mean() > 0.5
    assert not np.array_equal(whole.strips["last"], whole.strips["middle"])


def test_seeds_differ_in_everything_and_contenders_begin_alike(trained: Callable[..., Trained]) -> None:
    first, other = trained(epochs=2), trained(epochs=2, seed=1)
    assert first.epochs != other.epochs and first.mean != other.mean
    one, two = (trained(contender, epochs=2, tau=1e6, curriculum_floor=0.0) for contender in ("random", "none"))
    assert all(torch.equal(one.network[name], value) for name, value in two.network.items())


def test_bfloat16_learns_what_float32_does(whole: Trained, trained: Callable[..., Trained]) -> None:
    narrow = trained(on=runtime(torch.bfloat16))
    assert all(value.dtype is torch.float32 for value in narrow.network.values())
    for ours, theirs in zip(narrow.epochs, whole.epochs, strict=True):
        assert ours["train_loss"] != theirs["train_loss"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.1)
    with pytest.raises(UsageError, match="float16 would lose small gradients"):
        trained(on=runtime(torch.float16))


def test_a_policy_that_starts_later_moves_later(trained: Callable[..., Trained]) -> None:
    found = trained(policy_start=2)
    assert [row["policy_updates"] for row in found.epochs] == [0, 0, 2]
    assert [row["hypergradient_norm"] is None for row in found.epochs] == [True, True, False]
    untrained = trained(policy_start=9)
    policy = Policy(48, 4).state_dict()
    assert untrained.updates == 0 and untrained.policy is not None
    assert all(torch.equal(untrained.policy[name], value) for name, value in policy.items())


@pytest.fixture(scope="module")
def transferable(data: Path, whole: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy of `whole`, as a run leaves it."""
    folder = tmp_path_factory.mktemp("policy")
    shape = Shape("cnn-small", 1, 8, 8, tuple("0123456789"), whole.mean, whole.std)
    about = {"k": 2, "jitter": 0.1, "temperature": 0.5, "hidden": 0}
    operations = chosen(settled().ops)
    write_model(folder, whole.network, shape)
    assert whole.policy is not None
    rows: list[dict[str, float]] = [{}] * len(operations)
    write_policy(folder, whole.policy, whole.network, shape, operations=operations, chosen=rows, about=about)
    return folder


def test_a_policy_that_is_given_is_used_as_it_is(
    whole: Trained, trained: Callable[..., Trained], transferable: Path
) -> None:
    before = {path.name: path.read_bytes() for path in transferable.iterdir()}
    found = trained("transfer", policy=transferable, seed=3, ops="ShearX,Rotate")
    assert found.policy is None and found.updates == 0
    assert found.history.shape == (EPOCHS, 10, 4, 6) and len(found.strips) == 3
    assert np.array_equal(found.history[0], found.history[-1])
    assert {path.name: path.read_bytes() for path in transferable.iterdir()} == before
    plain, other = trained("none", seed=3), trained("random", seed=3)
    assert not torch.equal(found.network["classifier.weight"], plain.network["classifier.weight"])
    assert found.epochs[-1]["augmented"] == other.epochs[-1]["augmented"] > 0


def test_crops_mirrors_and_holes_reach_the_network(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(course.Course, "_gradient", _seeing(seen, course.Course._gradient))
    train_on(data, "none", crop=2, flip=True, cutout=3, epochs=2)
    images = open_prepared(data)
    divided = parts(images, images.options, seed=0)
    order = np.random.Generator(np.random.Philox(key=derive(0, "order/0"))).permutation(22)
    batch = images.images[divided.train[order[:8]]]
    offsets, mirrored = drawn("crop", 0).integers(5, size=(8, 2)), drawn("flip", 0).random(8) < 0.5
    centres = (drawn("holes", 0).random((8, 2), dtype=np.float32) * 8).astype(int)
    assert mirrored.any() and not mirrored.all()
    for row, image in enumerate(batch[:, 0]):
        framed = np.pad(image, 2)[offsets[row, 1] :, offsets[row, 0] :][:8, :8]
        expected = ((framed[:, ::-1] if mirrored[row] else framed) / 255 - divided.mean[0]) / divided.std[0]
        (x, y), top = centres[row], np.maximum(centres[row] - 1, 0)
        expected[top[1] : y + 2, top[0] : x + 2] = 0
        np.testing.assert_allclose(seen[0][row, 0].numpy(), expected, atol=1e-5)


def _seeing(seen: list[Tensor], usual: Callable[..., Any]) -> Callable[..., Any]:
    def gradient(self: Any, x: Tensor, *others: Any) -> Any:
        seen.append(x)
        return usual(self, x, *others)

    return gradient


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("contender", ["madaug", "none"])
def test_a_training_that_diverges_ends_with_the_step_and_what_is_kept(
    trained: Callable[..., Trained], tmp_path: Path, contender: str
) -> None:
    with pytest.raises(CheckFailed, match=r"seed 0: the [\w ]+ was not finite at step [2-9]") as caught:
        trained(contender, lr=1e6, checkpoint=tmp_path / "state")
    assert re.search(r"state keeps the state after step \d", caught.value.message) and caught.value.exit_code == 9
    assert all(value.isfinite().all() for value in load_file(tmp_path / "state").values() if value.is_floating_point())
    with pytest.raises(CheckFailed, match="nothing is kept"):
        trained(contender, lr=1e6)


# --- broken off and taken up -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("contender", ["madaug", "train+val"])
def test_a_run_that_was_broken_off_goes_on_to_the_same_bits(data: Path, tmp_path: Path, contender: str) -> None:
    """After any step, and again and again."""
    told: dict[str, Any] = {"policy_hidden": 1, "select": "validation", "crop": 1, "flip": True, "cutout": 2}
    expected = train_on(data, contender, **told)
    steps = STEPS if contender == "madaug" else 18
    for after in range(1, steps + 1):
        state = tmp_path / f"{after}.state"
        with pytest.raises(Stop):
            train_on(data, contender, checkpoint=state, progress=Stopping(after), **told)
        progress = Stopping()
        resumed = train_on(data, contender, checkpoint=state, progress=progress, **told)
        assert same(resumed, expected), after
        assert progress.advanced == [after, *[1] * (steps - after)]
    state = tmp_path / "state"
    for after in range(2, steps):
        with pytest.raises(Stop):
            train_on(data, contender, checkpoint=state, progress=Stopping(after), **told)
    assert same(train_on(data, contender, checkpoint=state, **told), expected)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"contender": "random"},
        {"lr": 0.2},
        {"ops": "Invert,Identity"},
        {"epochs": 4},
        {"on": runtime(torch.bfloat16)},
        {"data": 23},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_the_state_of_another_training_is_refused(
    data: Path, tmp_path_factory: pytest.TempPathFactory, changed: dict[str, Any]
) -> None:
    state = tmp_path_factory.getbasetemp() / "madaug_of_another"
    if not state.exists():
        with pytest.raises(Stop):
            train_on(data, checkpoint=state, progress=Stopping(2))
    before = state.read_bytes()
    if "data" in changed:
        changed = {"data": prepared(tmp_path_factory.mktemp("other"), changed["data"], 1754)}
    with pytest.raises(UsageError, match="is of a training with other images or options") as caught:
        train_on(**{"data": data, "checkpoint": state, **changed})
    assert "--overwrite" in (caught.value.hint or "") and state.read_bytes() == before


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("damage", ["cut", "empty", "another", "text"])
def test_a_damaged_state_is_told(trained: Callable[..., Trained], tmp_path: Path, damage: str) -> None:
    state = tmp_path / "state"
    with pytest.raises(Stop):
        trained(checkpoint=state, progress=Stopping(2))
    content = state.read_bytes()
    if damage == "another":
        save_file({"weights": torch.zeros(3)}, state)
    else:
        state.write_bytes({"cut": content[:-9], "empty": b"", "text": b"no state"}[damage])
    with pytest.raises(MissingError, match="no state of a training can be read from it"):
        trained(checkpoint=state)


@pytest.mark.usefixtures("always")
def test_a_full_disk_leaves_the_last_state_and_nothing_besides(trained: Callable[..., Trained], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the folder does not exist"):
        trained(checkpoint=tmp_path / "nowhere" / "state")
    state = tmp_path / "state"
    with pytest.raises(Stop):
        trained(checkpoint=state, progress=Stopping(2))
    before = state.read_bytes()
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, usual[1]))
    try:
        with pytest.raises(OutputError, match="would exceed the size limit"):
            trained(checkpoint=state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert [path.name for path in tmp_path.iterdir()] == ["state"] and state.read_bytes() == before


def test_a_result_goes_from_process_to_process(whole: Trained) -> None:
    assert same(pickle.loads(pickle.dumps(whole)), whole)


def _surroundings() -> dict[str, str]:
    """The environment of a process that imports what tests share."""
    tests = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])}


_KILLED = """
import sys
from pathlib import Path
from methods.madaug_train.trainings import trained
from pomona.methods.madaug_train import course

course._EVERY = 0.0
trained(Path(sys.argv[1]), checkpoint=Path(sys.argv[2]), epochs=30)
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    """Acceptance check A9, without the command line."""
    state = tmp_path / "state"
    for kill in range(3):
        start = [sys.executable, "-c", _KILLED, str(data), str(state)]
        process = subprocess.Popen(start, env=_surroundings())
        before = state.read_bytes() if kill else b""
        while process.poll() is None and (not state.exists() or state.read_bytes() == before):
            time.sleep(0.001)
        time.sleep(0.037 * kill)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    progress = Stopping()
    resumed = train_on(data, checkpoint=state, progress=progress, epochs=30)
    assert 3 <= progress.advanced[0] < 90
    assert same(resumed, train_on(data, epochs=30))


_LAUNCHED = """
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from methods.madaug_train import trainings
from pomona.methods.madaug_train import course, training
from pomona.runtime.device import Runtime

data, found = map(Path, sys.argv[1:])
runtime = Runtime.open("cpu", "float32", 0)
policies = []
usual = course.Course.predictions
course.Course.predictions = lambda self: policies.append(self.policy()) or usual(self)
if runtime.is_main:
    whole = trainings.trained(data, on=runtime, checkpoint=found / "state", **trainings.LAUNCHED)
    tensors = {f"network.{name}": value for name, value in whole.network.items()}
    tensors |= {"history": torch.from_numpy(whole.history), "predictions": torch.from_numpy(whole.predictions)}
    save_file(tensors, found / "main.safetensors")
    (found / "rows.json").write_text(json.dumps(whole.epochs))
    runtime.close()
else:
    training.share(runtime)
    runtime.serve()
save_file(policies[0], found / f"policy-{runtime.rank}.safetensors")
torch.distributed.destroy_process_group()
os._exit(0)  # as the command line does: threads of torch can abort an interpreter that ends beside them
"""


@pytest.mark.slow
def test_three_processes_take_the_same_steps_as_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last batch, of two images, one has none; and what one process has begun, three go on with."""
    expected = train_on(data, **LAUNCHED)
    (tmp_path / "launched.py").write_text(_LAUNCHED)
    monkeypatch.setattr(course, "_EVERY", 0.0)
    with pytest.raises(Stop):
        train_on(data, checkpoint=tmp_path / "state", progress=Stopping(3), **LAUNCHED)
    start = [
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "3",
        "launched.py",
        str(data),
        str(tmp_path),
    ]
    subprocess.run([sys.executable, "-m", *start], cwd=tmp_path, check=True, timeout=200, env=_surroundings())
    found = load_file(tmp_path / "main.safetensors")
    for name, value in expected.network.items():
        torch.testing.assert_close(found[f"network.{name}"], value, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(found["history"], expected.history, atol=1e-4)
    assert (found["predictions"].numpy() == expected.predictions).mean() > 0.99
    for ours, theirs in zip(json.loads((tmp_path / "rows.json").read_text()), expected.epochs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)
    policies = [(tmp_path / f"policy-{rank}.safetensors").read_bytes() for rank in range(3)]
    assert policies[0] == policies[1] == policies[2]
