"""Several processes give the bytes of one, and end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import command
from specimens import RECORDS, jsonl

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pomona_cli"]
# Without a GPU `--multi_gpu` is still what makes it start several processes: with `--cpu`, or a configuration that says
# MULTI_CPU, it starts one unless mpirun is there.
ACCELERATE = [
    *[sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    *["--main_process_port", "0", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
    *["-m", "pomona_cli"],
]
# Small batches, so that there is work for both.
METHOD = ["ifd-score", "--dtype", "float32", "--tokens-per-batch", "200", "-v"]


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path, environment: dict[str, str]) -> Iterator[object]:
    """Start a command in `tmp_path` in a process group of its own, of which nothing outlives the test."""
    begun: list[subprocess.Popen[bytes]] = []

    def run(words: list[str], *more: str, **streams: int) -> subprocess.Popen[bytes]:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        process = subprocess.Popen(
            [*words, *METHOD, "--model", str(tiny_model), *more],
            cwd=tmp_path,
            env=environment,
            start_new_session=True,
            **pipes,
        )
        begun.append(process)
        return process

    yield run
    for process in begun:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def alive(group: int) -> list[int]:
    """Processes of the session that the process `group` leads, zombies aside."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == group and state != "Z":
            found.append(int(entry.name))
    return found


def gone(group: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not alive(group):
            return True
        time.sleep(0.05)
    return False


def finished(process: subprocess.Popen[bytes], seconds: float = 120) -> tuple[int, bytes, bytes]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def same_bytes(start, words: list[str], folder: Path) -> None:
    (folder / "in.jsonl").write_bytes(jsonl(RECORDS))
    code, alone, told = finished(start(command(), "in.jsonl"))
    assert (code, alone.count(b"\n")) == (0, len(RECORDS)) and b"processes: 1," in told
    code, together, told = finished(start(words, "in.jsonl"))
    assert code == 0, told.decode()
    assert b"processes: 2," in told
    assert together == alone


def test_two_processes_write_the_bytes_of_one(start, tmp_path: Path) -> None:
    same_bytes(start, TORCHRUN, tmp_path)


@pytest.mark.slow
def test_accelerate_launch_writes_the_bytes_of_one(start, tmp_path: Path) -> None:
    same_bytes(start, ACCELERATE, tmp_path)


@pytest.mark.slow
def test_an_output_file_and_its_summary_are_written_once(start, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(RECORDS))
    alone = finished(start(command(), "in.jsonl", "-o", "one.jsonl"))
    together = finished(start(TORCHRUN, "in.jsonl", "-o", "two.jsonl"))
    assert together[0] == alone[0] == 0, together[2].decode()
    assert together[1] == alone[1].replace(b"one.jsonl", b"two.jsonl")
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


@pytest.mark.slow
def test_records_from_a_pipe_are_read_by_one_process(start, tmp_path: Path) -> None:
    process = start(TORCHRUN, "-", stdin=subprocess.PIPE)
    out, err = process.communicate(jsonl(RECORDS), timeout=120)
    assert process.returncode == 0, err.decode()
    assert out.count(b"\n") == len(RECORDS)


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 30], ids=["before the model", "while scoring"])
def test_a_bad_record_ends_every_process(place: int, start, tmp_path: Path) -> None:
    lines = jsonl(RECORDS).splitlines(keepends=True)
    (tmp_path / "in.jsonl").write_bytes(b"".join([*lines[:place], b"{broken\n", *lines[place:]]))
    process = start(TORCHRUN, "in.jsonl")
    started = time.monotonic()
    code, _, told = finished(process)
    assert code != 0 and time.monotonic() - started < 60
    assert f"in.jsonl:{place + 1}".encode() in told and b"exitcode  : 4" in told
    assert gone(process.pid)


@pytest.mark.slow
def test_a_missing_model_ends_every_process(start, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(RECORDS))
    process = start(TORCHRUN, "in.jsonl", "--model", "./missing")
    code, out, told = finished(process)
    assert code != 0 and out == b"" and b"exitcode  : 5" in told
    assert gone(process.pid)


@pytest.mark.slow
def test_a_launch_with_nothing_to_compute_ends(start, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"")
    process = start(TORCHRUN, "in.jsonl")
    code, out, told = finished(process)
    assert (code, out) == (0, b""), told.decode()
    assert gone(process.pid)


@pytest.mark.slow
def test_sigterm_to_the_launcher_ends_every_process_and_leaves_nothing(start, tmp_path: Path) -> None:
    """Rank 0 waits for input, rank 1 for rank 0."""
    process = start(TORCHRUN, "-", "-o", "out.jsonl", stdin=subprocess.PIPE)
    process.stdin.write(jsonl(RECORDS))
    process.stdin.flush()
    while b"scoring on" not in (line := process.stderr.readline()):
        assert line, "ended early"
    time.sleep(2)
    assert process.poll() is None and (tmp_path / ".out.jsonl.partial").exists()
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert process.wait(timeout=60) != 0
    assert gone(process.pid)
    assert time.monotonic() - started < 40
    assert {path.name for path in tmp_path.iterdir()} <= {"out.jsonl.journal"}
