"""The device is what was asked for, and neither threads nor processes show in the results."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pomona.errors import UnavailableError, UsageError
from pomona.runtime import device
from pomona.runtime.device import Runtime


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has opened nothing yet; what the process had before is put back."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = (AcceleratorState, GradientState, PartialState)
    before = [dict(state._shared_state) for state in states]
    monkeypatch.setattr(Runtime, "_opened", {})
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "")
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    for name in ("POMONA_THREADS", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for state in states:
        state._shared_state.clear()
    intra_op = torch.get_num_threads()
    yield
    torch.set_num_threads(intra_op)
    for state, content in zip(states, before, strict=True):
        state._shared_state.clear()
        state._shared_state.update(content)


def runtime(threads: int) -> Runtime:
    return Runtime(None, torch.device("cpu"), torch.float32, "a test", threads)


# --- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda:x", "gpu", "cpu:0", "mps:1", "cuda:-1", "CPU", ""])
def test_a_device_that_is_none_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="expected auto, cpu, cuda, cuda:N or mps"):
        Runtime.open(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_said_before_any_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match=f"--device {name}: torch sees no CUDA device") as caught:
        Runtime.open(name)
    assert "--device cpu" in (caught.value.hint or "")


def test_a_gpu_beyond_the_last_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device._probe("cuda")
    device._probe("cuda:1")
    with pytest.raises(UnavailableError, match="it has 2 CUDA devices"):
        device._probe("cuda:2")


def test_metal_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match="no Metal device"):
        Runtime.open("mps")


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_without_a_gpu_work_is_on_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    opened = Runtime.open(name, "float32")
    assert (opened.device.type, opened.rank, opened.world, opened.is_main) == ("cpu", 0, 1, True)
    assert torch.get_num_threads() == 1
    opened.close()  # nobody to let go


@pytest.mark.parametrize(("computes", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_only_where_the_processor_computes_in_it(
    computes: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: computes, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    opened = Runtime.open("cpu")
    assert opened.dtype is expected
    assert str(expected).removeprefix("torch.") in opened.why


def test_a_torch_without_the_probes_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert Runtime.open("cpu").dtype is torch.float32


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), torch.bfloat16), ((7, 5), torch.float32)])
def test_auto_asks_the_gpu(capability: tuple[int, int], expected: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: capability)
    assert device._dtype("auto", torch.device("cuda", 0))[0] is expected


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_number_format_asked_for_is_taken(name: str) -> None:
    opened = Runtime.open("cpu", name)
    assert opened.dtype is getattr(torch, name) and f"{name} as asked" in opened.why


def test_an_unknown_number_format_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="expected auto, float32, bfloat16, float16"):
        Runtime.open("cpu", "float8")


def test_a_second_device_in_one_process_is_refused_and_the_same_one_is_not() -> None:
    first = Runtime.open("cpu", "float32")
    assert Runtime.open("cpu", "bfloat16").accelerator is first.accelerator
    with pytest.raises(UsageError, match="already runs on cpu, not on auto"):
        Runtime.open("auto", "float32")


def test_opening_seeds_torch() -> None:
    draws = []
    for seed in (3, 3, 4):
        Runtime.open("cpu", "float32", seed)
        draws.append(float(torch.rand(())))
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"POMONA_THREADS": "5", "OMP_NUM_THREADS": "2"}, 5),
        ({"OMP_NUM_THREADS": "2"}, 2),
        ({"POMONA_THREADS": "many"}, 4),
        ({"POMONA_THREADS": "0"}, 4),
        ({}, 4),
    ],
)
def test_threads_follow_the_environment_then_the_processors(
    variables: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert device._threads(2) == expected


def test_threads_where_the_system_does_not_tell_a_process_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert (device._threads(1), device._threads(100)) == (6, 1)


def test_the_cpu_is_always_described() -> None:
    first = next(iter(device.describe()))
    assert first["name"] == "cpu" and isinstance(first["threads"], int) and first["threads"] >= 1


# --- mapping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_results_keep_the_order_of_items(threads: int) -> None:
    opened = runtime(threads)
    opened.register("square", lambda item: (time.sleep(0.002 * (item % 3)), item * item)[1])
    assert opened.map("square", list(range(40))) == [n * n for n in range(40)]
    assert opened.map("square", [7]) == [49]
    assert opened.map("square", []) == []


def test_items_really_run_side_by_side() -> None:
    opened = runtime(3)
    together = threading.Barrier(3, timeout=20)
    opened.register("meet", lambda item: together.wait() >= 0)
    assert opened.map("meet", [0, 1, 2]) == [True] * 3


def test_each_thread_runs_torch_with_one_thread_of_its_own() -> None:
    torch.set_num_threads(2)
    opened = runtime(3)
    together = threading.Barrier(3, timeout=20)

    def look(item: int) -> tuple[int, int]:
        together.wait()
        return threading.get_ident(), torch.get_num_threads()

    opened.register("look", look)
    found = opened.map("look", [0, 1, 2])
    assert len({thread for thread, _ in found}) == 3 and threading.get_ident() not in {t for t, _ in found}
    assert [count for _, count in found] == [1, 1, 1]


class Odd(Exception):
    """A task's own."""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_tasks_own_exception_is_raised_and_the_rest_is_not_begun(threads: int) -> None:
    opened = runtime(threads)
    begun: list[int] = []

    def task(item: int) -> int:
        begun.append(item)
        if item == 1:
            raise Odd("item 1")
        time.sleep(0.01)
        return item

    opened.register("task", task)
    with pytest.raises(Odd, match="item 1"):
        opened.map("task", list(range(200)))
    at_failure = len(begun)
    time.sleep(0.1)
    assert len(begun) <= at_failure + threads < 50
    opened.register("after", lambda item: item + 1)
    assert opened.map("after", [1, 2, 3]) == [2, 3, 4]


def test_threads_do_not_change_a_bit_of_a_models_losses(tiny_model: Path) -> None:
    from pomona.models.loading import load_causal_lm
    from pomona.models.losses import Passage, passage_nll

    rng = random.Random(0)
    lengths = [rng.randint(3, 80) for _ in range(40)]
    passages = [Passage(tuple(rng.randrange(258) for _ in range(n)), ((1, 2), (2, n))) for n in lengths]
    found = []
    for threads in (1, 3):
        scorer = load_causal_lm(str(tiny_model), runtime(threads))
        found.append(passage_nll(scorer, passages, tokens_per_batch=200, chunk_rows=50))
    assert found[0] == found[1]


# --- processes -------------------------------------------------------------------------------------------------------

_LAUNCHED = """
import json, os, sys
from pomona.runtime.device import Runtime

runtime = Runtime.open("auto", "float32")
runtime.register("who", lambda item: [item, runtime.rank, os.getpid()])

def task(item):
    if item == 3:
        raise ValueError("item 3")
    return item

runtime.register("fails", task)
if runtime.is_main:
    print(json.dumps([runtime.map("who", list(range(n))) for n in (5, 1, 0)]), flush=True)
    if "fail" in sys.argv:
        runtime.map("fails", list(range(6)))
    runtime.close()
else:
    runtime.serve()
"""


def launched(folder: Path, *args: str) -> subprocess.CompletedProcess[bytes]:
    (folder / "launched.py").write_text(_LAUNCHED)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "launched.py", *args],
        cwd=folder,
        capture_output=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_take_turns_and_results_keep_their_order(tmp_path: Path) -> None:
    done = launched(tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    five, one, none = json.loads(done.stdout)
    assert [[item, rank] for item, rank, _ in five] == [[0, 0], [1, 1], [2, 0], [3, 1], [4, 0]]
    assert len({pid for _, _, pid in five}) == 2
    assert [[item, rank] for item, rank, _ in one] == [[0, 0]] and none == []


@pytest.mark.slow
def test_a_task_that_fails_in_the_other_process_ends_both(tmp_path: Path) -> None:
    started = time.monotonic()
    done = launched(tmp_path, "fail")
    assert done.returncode != 0 and b"item 3" in done.stderr
    assert time.monotonic() - started < 60
