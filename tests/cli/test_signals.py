"""Signals end a run as a shell expects, and nothing half done stays behind."""

from __future__ import annotations

import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import warm
from conftest import command
from specimens import RECORDS, SPECIMENS, STREAMS, jsonl

every_stream = pytest.mark.parametrize("name", STREAMS)


@every_stream
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_what_the_process_dies_by(name: str, number: int, tmp_path: Path, tiny_model: Path) -> None:
    options = SPECIMENS[name].options(tmp_path, tiny_model)
    process = warm.start(
        command(name, "-", *options, "-o", "out.jsonl"),
        not SPECIMENS[name].heavy,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(jsonl(RECORDS))
    process.stdin.flush()
    while not (tmp_path / ".out.jsonl.partial").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=30) == -number
    assert b"Traceback" not in process.stderr.read()
    left = {path.name for path in tmp_path.iterdir()} - {"ratings.jsonl"}
    assert left <= {"out.jsonl.journal"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_while_torch_is_loaded_whose_code_an_exception_would_abort(number: int, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(
        "import os, signal, sys, time\n"
        "try:\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(0.5)\n"
        "except BaseException:\n"
        "    os.abort()\n"
    )
    script = "from pomona_cli import main as m\nm.build_app = lambda: lambda **_: load()\n"
    script += "def load():\n    with m.seam('x'):\n        import torch, time\n        time.sleep(60)\nm.main()\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (-number, b"")


@pytest.mark.parametrize("swallowed", ["pass", "raise ValueError"])
def test_a_signal_counts_even_where_its_exception_is_swallowed(swallowed: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import time\n"
        "import pomona.io.stream as s\n"
        "import pomona_cli.main as m\n"
        "m._CLEANING_UP_S = 1.0\n"
        "def emit(self, record):\n"
        "    open('here', 'w').close()\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    except BaseException:\n"
        f"        {swallowed}\n"
        "    time.sleep(60)\n"
        "s.Stream.emit = emit\n"
    )
    (tmp_path / "in.jsonl").write_bytes(jsonl(RECORDS))
    options = SPECIMENS["alpagasus-filter"].options(tmp_path, tmp_path)
    process = subprocess.Popen(
        command("alpagasus-filter", "in.jsonl", *options, "-o", "out.jsonl"),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert _wait_for(tmp_path / "here")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == -signal.SIGINT


@every_stream
def test_ctrl_c_ends_a_shell_loop(name: str, tmp_path: Path, tiny_model: Path) -> None:
    """A command that exits 130 by itself lets bash go on to the next item; one that dies by SIGINT stops it."""
    options = " ".join(f"'{word}'" for word in command(name, "-", *SPECIMENS[name].options(tmp_path, tiny_model)))
    (tmp_path / "loop.sh").write_text(
        f"for i in 1 2 3; do echo turn $i >> turns; mkfifo f$i; {options} < f$i -o out$i.jsonl; done\n"
        "echo over >> turns\n"
    )
    main, other = pty.openpty()
    process = subprocess.Popen(
        ["bash", "loop.sh"], stdin=other, stdout=other, stderr=other, cwd=tmp_path, preexec_fn=_own_terminal
    )
    feeder = subprocess.Popen(["bash", "-c", "sleep 60 > f1"], cwd=tmp_path) if _wait_for(tmp_path / "f1") else None
    assert feeder is not None
    try:
        assert _wait_for(tmp_path / ".out1.jsonl.partial")
        os.write(main, b"\x03")
        process.wait(timeout=30)
    finally:
        feeder.kill()
        feeder.wait()
        os.close(main)
        os.close(other)
    assert (tmp_path / "turns").read_text() == "turn 1\n"


def _own_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _wait_for(path: Path, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists():
            return True
        time.sleep(0.01)
    return False


def kill_and_resume(name: str, kills: int, records: int, folder: Path, model: Path, *more: str) -> int:
    """Kill a run at `kills` random moments, resuming after each; returns how many found the run still going."""
    many = [
        {**RECORDS[n % 40], "id": f"r{n % 200}", "instruction": f"{n}: {RECORDS[n % 40]['instruction']}"}
        for n in range(records)
    ]
    (folder / "in.jsonl").write_bytes(jsonl(many))
    options = [*SPECIMENS[name].options(folder, model), *more]
    cold = not SPECIMENS[name].heavy

    def run(output: str, cold: bool = cold) -> subprocess.CompletedProcess[bytes]:
        return warm.run(command(name, "in.jsonl", *options, "-o", output, "--resume"), cold=cold, cwd=folder)

    assert run("whole.jsonl", cold=True).returncode == 0
    warm.run(command("methods"))  # so that the next start is a warm one
    started = time.monotonic()
    run("timed.jsonl")
    length = time.monotonic() - started
    rng = random.Random(0)
    hit = 0
    lengths = [length, length]  # of a first attempt and of its resumption, as last seen: the machine's pace changes
    for number in range(kills):
        for left in (*folder.glob("cut.jsonl*"), *folder.glob(".cut*")):
            left.unlink()
        # kills fall both early and late: within the first attempt, then within its resumption
        for phase in (0, 1):
            begun = time.monotonic()
            process = warm.start(
                command(name, "in.jsonl", *options, "-o", "cut.jsonl", "--resume"),
                cold,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            try:
                process.wait(timeout=rng.uniform(0.1, 0.9) * lengths[phase])
                lengths[phase] = time.monotonic() - begun
            except subprocess.TimeoutExpired:
                hit += 1
            process.kill()
            process.communicate()
            if (folder / "cut.jsonl").exists():
                assert (folder / "cut.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes(), number
        done = run("cut.jsonl")
        assert done.returncode == 0, done.stderr
        assert (folder / "cut.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes(), number
        assert json.loads((folder / "cut.jsonl.manifest.json").read_bytes())["state"] == "complete"
        assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    return hit


@every_stream
def test_killed_runs_resume_to_the_same_bytes(name: str, tmp_path: Path, tiny_model: Path) -> None:
    assert kill_and_resume(name, 3, 400, tmp_path, tiny_model) >= 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@every_stream
def test_twenty_random_kills_resume_to_the_same_bytes(name: str, tmp_path: Path, tiny_model: Path) -> None:
    hit = kill_and_resume(name, 20, 2000 if SPECIMENS[name].heavy else 40_000, tmp_path, tiny_model)
    print(f"{name}: {hit} of 40 kills found the run still going")
    assert hit >= 20


@every_stream
def test_resuming_a_finished_run_does_nothing_and_other_settings_are_refused(
    name: str, tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(RECORDS))
    options = SPECIMENS[name].options(tmp_path, tiny_model)

    def run(*more: str) -> subprocess.CompletedProcess[bytes]:
        words = command(name, "in.jsonl", *options, "-o", "out.jsonl", *more)
        return warm.run(words, cold=not SPECIMENS[name].heavy, cwd=tmp_path)

    first = run()
    before = (tmp_path / "out.jsonl").stat()
    again = run("--resume")
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert b"finished already" in again.stderr
    assert (tmp_path / "out.jsonl").stat().st_mtime_ns == before.st_mtime_ns
    other = run("--resume", "--limit", "3")
    assert other.returncode == 2 and b"--overwrite" in other.stderr
    with (tmp_path / "in.jsonl").open("ab") as file:
        file.write(jsonl(RECORDS[:1]))
    changed = run("--resume")
    assert changed.returncode == 2, changed.stderr


def test_another_ratings_file_is_another_input(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(RECORDS))
    options = ["in.jsonl", *SPECIMENS["alpagasus-filter"].options(tmp_path, tmp_path), "-o", "out.jsonl", "--resume"]

    def run() -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(command("alpagasus-filter", *options), cwd=tmp_path, capture_output=True)

    assert run().returncode == 0 and run().returncode == 0
    with (tmp_path / "ratings.jsonl").open("ab") as file:
        file.write(jsonl([{"id": "another", "score": 1}]))
    assert run().returncode == 2
