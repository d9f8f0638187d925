"""Training: the steps are DDPM's by an independent loop, and nothing but the arguments shows in the weights."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from methods.diffeat_extract.trainings import IMAGES, digits, runtime, same, trained, weights
from pomona.errors import CheckFailed, DataError, MissingError, OutputError, UnavailableError, UsageError
from pomona.methods.diffeat_extract import course, training, training_state
from pomona.methods.diffeat_extract.config import Config
from pomona.methods.diffeat_extract.training import Trained, plan
from pomona.runtime.progress import Quiet
from pomona.runtime.seeds import derive
from stopping import Stop, Stopping

STEPS = 7
PLAIN: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (6, 12),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "add_attention": False,
    "norm_num_groups": 2,
}


@pytest.fixture(autouse=True)
def shards_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "_SHARD", 2)


@pytest.fixture(scope="module")
def whole() -> Trained:
    """Seven steps without a break."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(course, "_SHARD", 2)
        return trained(STEPS)


# --- what is trained -------------------------------------------------------------------------------------------------


def residual(inside: int, outside: int, time: int) -> int:
    """Parameters of a residual block: two norms, two convolutions, the embedding's map, a 1x1 where widths differ."""
    shortcut = inside * outside + outside if inside != outside else 0
    convolutions = 9 * inside * outside + 9 * outside**2 + 2 * outside
    return 2 * inside + 2 * outside + convolutions + (time + 1) * outside + shortcut


def test_the_plan_is_the_model_of_the_digits() -> None:
    found = plan((898, 8, 8, 1), Config(train_model=2000))
    time, half, full = 128, 32, 64
    expected = (9 * half + half) + (half * time + time + time**2 + time)
    expected += residual(half, half, time) + (9 * half**2 + half) + residual(half, full, time)
    expected += 2 * residual(full, full, time)
    expected += residual(full + full, full, time) + residual(full + half, full, time) + (9 * full**2 + full)
    expected += residual(full + half, half, time) + residual(half + half, half, time) + 2 * half + (9 * half + 1)
    assert (found.parameters, found.bytes) == (expected, 4 * expected) == (634_273, 2_537_092)
    assert (found.images, found.steps, found.epochs) == (898, 2000, 2000 * 64 / 898)
    assert found.config["norm_num_groups"] == 8


def test_attention_is_where_it_was_asked_for() -> None:
    asked = Config(train_model=1, widths="8,12,20", attention_at="4,8", residual_blocks=2)
    found = plan((3, 16, 16, 3), asked).config
    assert found["down_block_types"] == ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"]
    assert found["up_block_types"] == ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    assert found["add_attention"] and found["norm_num_groups"] == 4 and found["layers_per_block"] == 2
    assert not plan((3, 16, 16, 3), Config(train_model=1, widths="8,12,20", attention_at="16")).config["add_attention"]


@pytest.mark.parametrize(
    ("shape", "asked", "error", "said"),
    [
        ((0, 8, 8, 1), {}, DataError, "no images"),
        ((2, 8, 6, 1), {}, DataError, "6 x 8 pixels"),
        ((2, 10, 10, 1), {"widths": "8,8,8"}, UsageError, "10 pixels cannot be halved 2 times"),
        ((2, 8, 8, 1), {"attention_at": "8,3"}, UsageError, "--attention-at 3: no map has that side"),
    ],
)
def test_what_cannot_be_trained_is_refused(shape: Any, asked: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        plan(shape, Config(train_model=1, **asked))


def test_float16_is_refused_and_a_warm_up_without_end_is_told() -> None:
    with pytest.raises(UsageError, match="float16 would lose small gradients"):
        trained(1, runtime=runtime(dtype=torch.float16))
    progress = Stopping()
    trained(1, progress=progress)
    assert "the warm-up of 2 steps is not over after 1" in progress.told[0]


def test_without_diffusers_the_error_is_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers.models.unets.unet_2d", None)
    with pytest.raises(UnavailableError) as caught:
        plan((2, 8, 8, 1), Config(train_model=1))
    assert caught.value.hint == "pip install 'pomona[vision]'"


# --- how it is trained -----------------------------------------------------------------------------------------------


def drawn(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(derive(0, name)))


def reference() -> tuple[list[float], list[torch.Tensor]]:
    """Losses and averaged weights of `whole` by a plain loop: one pass a batch, torch's own AdamW a parameter."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(derive(0, "weights"))
    module = UNet2DModel(**PLAIN)
    parameters = list(module.parameters())
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.01, foreach=False)
    average = [parameter.detach().clone() for parameter in parameters]
    alpha_bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    order = np.concatenate([drawn(f"order/{epoch}").permutation(10) for epoch in range(4)])
    losses = []
    for step in range(STEPS):
        places = order[5 * step : 5 * step + 5]
        x = IMAGES[places].astype(np.float64).transpose(0, 3, 1, 2) / 255 * 2 - 1
        times = drawn(f"times/{step}").integers(1000, size=5)
        eps = drawn(f"noise/{step}").standard_normal(x.shape, dtype=np.float32)
        left = alpha_bars[times].reshape(5, 1, 1, 1)
        noisy = torch.from_numpy(np.sqrt(left) * x + np.sqrt(1 - left) * eps).float()
        loss = (module(noisy, torch.from_numpy(times)).sample - torch.from_numpy(eps)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        cosine = (1 + math.cos(math.pi * (step - 2) / (STEPS - 2))) / 2
        optimiser.param_groups[0]["lr"] = 1e-2 * ((step + 1) / 2 if step < 2 else cosine)
        optimiser.step()
        decay = min(0.995, (1 + step) / (10 + step))
        average = [
            decay * old + (1 - decay) * new.detach().double() for old, new in zip(average, parameters, strict=True)
        ]
        losses.append(loss.item())
    return losses, average


def test_the_steps_are_those_of_a_plain_loop(whole: Trained) -> None:
    losses, average = reference()
    assert whole.losses == pytest.approx([np.mean(losses)], rel=1e-5)
    for ours, theirs in zip(whole.module.parameters(), average, strict=True):
        # AdamW's first steps go by the sign of a gradient, which rounding turns where it is almost nothing.
        torch.testing.assert_close(ours.double(), theirs.double(), atol=2e-5, rtol=1e-4)
    assert not whole.module.training and not any(p.requires_grad for p in whole.module.parameters())


@pytest.mark.parametrize("threads", [1, 3])
def test_neither_threads_nor_the_global_seed_show_in_a_bit(whole: Trained, threads: int) -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert same(trained(STEPS, runtime=runtime(threads)), whole)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seeds_differ_in_everything() -> None:
    first, second = trained(1), trained(1, seed=1)
    assert first.losses != second.losses
    assert all(not torch.equal(a, b) for name, a in weights(first).items() if (b := weights(second)[name]).ndim > 1)


def test_every_image_comes_once_before_any_comes_twice() -> None:
    seen = [place for place, _ in zip(course._order(7, 3, 0), range(21), strict=False)]
    assert [sorted(seen[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert seen[:7] != seen[7:14]
    for start in (1, 7, 13):
        assert [p for p, _ in zip(course._order(7, 3, start), range(21 - start), strict=False)] == seen[start:]


def test_bfloat16_learns_what_float32_does(whole: Trained) -> None:
    narrow = trained(STEPS, runtime=runtime(2, torch.bfloat16))
    assert narrow.losses != whole.losses and narrow.losses == pytest.approx(whole.losses, rel=0.02)
    assert all(value.dtype is torch.float32 for value in weights(narrow).values())


def test_losses_are_means_of_a_hundred_steps() -> None:
    state = training_state.State.start(torch.zeros(1))
    for step in range(250):
        state.add(float(step))
    assert (state.losses, len(state.open), state.step) == ([49.5, 149.5], 50, 250)


def test_a_training_that_diverges_ends_with_the_step_and_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(course, "_EVERY", 0.0)
    with pytest.raises(CheckFailed, match=r"the (loss|gradient) was not finite at step \d+") as caught:
        trained(STEPS, learning_rate=1e30, checkpoint=tmp_path / "state")
    assert "state keeps the state after step" in caught.value.message and caught.value.exit_code == 9
    with pytest.raises(CheckFailed, match="nothing is kept"):
        trained(STEPS, learning_rate=1e30)


# --- broken off and taken up -----------------------------------------------------------------------------------------


def test_a_run_that_was_broken_off_goes_on_to_the_same_bits(
    whole: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state.safetensors"
    monkeypatch.setattr(course, "_EVERY", 0.0)
    monkeypatch.setattr(training_state, "WINDOW", 4)
    expected = trained(STEPS)
    assert len(expected.losses) == 2
    for after in (1, 3, 5):
        with pytest.raises(Stop):
            trained(STEPS, checkpoint=state, progress=Stopping(after))
    progress = Stopping()
    resumed = trained(STEPS, checkpoint=state, progress=progress, runtime=runtime(2))
    assert same(resumed, expected)
    assert all(torch.equal(weights(whole)[name], value) for name, value in weights(resumed).items())
    assert progress.advanced == [5, 1, 1]


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"images": IMAGES[::-1]},
        {"widths": "12,6"},
        {"attention_at": "2"},
        {"learning_rate": 2e-2},
        {"average": 0.9},
        {"train_batch": 4},
        {"warmup_steps": 1},
        {"steps": STEPS + 1},
        {"runtime": runtime(dtype=torch.bfloat16)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_the_state_of_another_training_is_refused(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    state = tmp_path_factory.getbasetemp() / "diffeat_of_another"
    if not state.exists():
        monkeypatch.setattr(course, "_EVERY", 0.0)
        with pytest.raises(Stop):
            trained(STEPS, checkpoint=state, progress=Stopping(1))
    before = state.read_bytes()
    with pytest.raises(UsageError, match="is of a training with other images or options") as caught:
        trained(**{"steps": STEPS, "checkpoint": state, **changed})
    assert "--overwrite" in (caught.value.hint or "") and state.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "empty", "another", "text"])
def test_a_damaged_state_is_told(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state"
    if damage == "another":
        training.write(trained(1), tmp_path)
        (tmp_path / training.WEIGHTS).rename(state)
    else:
        monkeypatch.setattr(course, "_EVERY", 0.0)
        trained(1, checkpoint=state)
        content = state.read_bytes()
        state.write_bytes({"cut": content[:-9], "empty": b"", "text": b"no state"}[damage])
    with pytest.raises(MissingError, match="no state of a training can be read from it"):
        trained(1, checkpoint=state)


def test_a_state_that_cannot_be_written_is_refused_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "_EVERY", 0.0)
    with pytest.raises(OutputError, match="the folder does not exist"):
        trained(1, checkpoint=tmp_path / "nowhere" / "state")


def test_a_full_disk_leaves_the_last_state_and_nothing_besides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state"
    monkeypatch.setattr(course, "_EVERY", 0.0)
    with pytest.raises(Stop):
        trained(STEPS, checkpoint=state, progress=Stopping(1))
    before = state.read_bytes()
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, usual[1]))
    try:
        with pytest.raises(OutputError, match="would exceed the size limit"):
            trained(STEPS, checkpoint=state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert [path.name for path in tmp_path.iterdir()] == ["state"] and state.read_bytes() == before


def _surroundings() -> dict[str, str]:
    """The environment of a process that imports what tests share."""
    tests = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])}


_KILLED = """
import sys
from pathlib import Path
from methods.diffeat_extract.trainings import trained
from pomona.methods.diffeat_extract import course

course._SHARD, course._EVERY = 2, 0.0
trained(40, checkpoint=Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state"
    for kill in range(3):
        process = subprocess.Popen([sys.executable, "-c", _KILLED, str(state)], env=_surroundings())
        before = state.read_bytes() if kill else b""
        while process.poll() is None and (not state.exists() or state.read_bytes() == before):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    progress = Stopping()
    assert same(trained(40, checkpoint=state, progress=progress), trained(40))
    assert progress.advanced[0] >= 3


_LAUNCHED = """
import os
import sys
import torch
from pathlib import Path
from methods.diffeat_extract.trainings import trained
from pomona.methods.diffeat_extract import course, training
from pomona.runtime.device import Runtime

course._SHARD = 2
runtime = Runtime.open("cpu", "float32", 0)
if runtime.is_main:
    training.write(trained(7, runtime=runtime, checkpoint=Path(sys.argv[1]) / "state"), Path(sys.argv[1]))
    runtime.close()
else:
    training.share(runtime)
    runtime.serve()
torch.distributed.destroy_process_group()
os._exit(0)  # as the command line does: threads of torch can abort an interpreter that ends beside them
"""


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(
    whole: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    (tmp_path / "launched.py").write_text(_LAUNCHED)
    # What one process has begun, two go on with: the state is given to the one that has not read it.
    monkeypatch.setattr(course, "_EVERY", 0.0)
    with pytest.raises(Stop):
        trained(STEPS, checkpoint=tmp_path / "state", progress=Stopping(3))
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "launched.py", str(tmp_path)]
    subprocess.run([sys.executable, "-m", *start], cwd=tmp_path, check=True, timeout=200, env=_surroundings())
    found = load_file(tmp_path / training.WEIGHTS)
    for name, value in weights(whole).items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


# --- what is written -------------------------------------------------------------------------------------------------


def test_diffusers_reads_the_model_and_predicts_the_same_noise(whole: Trained, tmp_path: Path) -> None:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        training.write(whole, folder)
    for file in sorted((tmp_path / "first").iterdir()):
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()
    read = UNet2DModel.from_pretrained(tmp_path / "first")
    x, times = torch.randn(4, 3, 4, 4), torch.tensor([0, 90, 500, 999])
    with torch.no_grad():
        assert (read(x, times).sample - whole.module(x, times).sample).abs().max() <= 1e-5
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "first")
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), expected, rtol=1e-4)
    assert scheduler.config.prediction_type == "epsilon"


def test_a_model_that_cannot_be_written_is_refused_output(whole: Trained, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the folder does not exist"):
        training.write(whole, tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_hundred_steps_on_the_digits() -> None:
    """Acceptance check B5."""
    images, _ = digits()
    runs = [trained_on_digits(images, 400) for _ in range(2)]
    assert 0.10 <= float(np.mean(runs[0].losses[-2:])) <= 0.12
    assert same(*runs)


def trained_on_digits(images: Any, steps: int) -> Trained:
    return training.train(
        images, Config(train_model=steps), seed=0, runtime=runtime(), checkpoint=None, progress=Quiet()
    )
