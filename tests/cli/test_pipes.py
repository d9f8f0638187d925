"""Pipes, full disks and closed ends, for every stream command."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import warm
from conftest import command
from specimens import COMMANDS, RECORDS, SPECIMENS, STREAMS, jsonl

every_stream = pytest.mark.parametrize("name", STREAMS)


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, cwd=folder, timeout=240, stdin=subprocess.DEVNULL
    )


def invocation(name: str, folder: Path, model: Path) -> str:
    return " ".join(f"'{word}'" for word in command(name, "-", *SPECIMENS[name].options(folder, model)))


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path) -> Any:
    """Start a stream command on records, or on another standard input, with pipes for the other streams."""

    def go(name: str, *args: str, records: list[dict[str, Any]] = RECORDS, **streams: Any) -> subprocess.Popen[bytes]:
        words = command(name, "-", *SPECIMENS[name].options(tmp_path, tiny_model), *args)
        (tmp_path / "in.jsonl").write_bytes(jsonl(records))
        with (tmp_path / "in.jsonl").open("rb") as source:
            streams = {"stdin": source, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
            return warm.start(words, not SPECIMENS[name].heavy, cwd=tmp_path, **streams)

    return go


def first_line(process: subprocess.Popen[bytes]) -> bytes:
    """What ``head -1`` would show; nobody reads the rest."""
    assert process.stdout is not None
    with process.stdout:
        return process.stdout.readline()


@every_stream
@pytest.mark.parametrize("count", [3, 40])
def test_a_reader_that_leaves_early_is_no_error(name: str, count: int, start: Any) -> None:
    with start(name, records=RECORDS[:count]) as process:
        assert first_line(process)
        told = process.stderr.read()
    assert process.returncode == 0
    assert b"Traceback" not in told and b"roken" not in told and b"Exception" not in told


@every_stream
def test_an_endless_input_gives_its_first_record_at_once(name: str, start: Any) -> None:
    record = jsonl(RECORDS[:1]).decode().strip()
    endless = subprocess.Popen(["yes", record], stdout=subprocess.PIPE)
    with endless, start(name, stdin=endless.stdout) as process:
        endless.stdout.close()
        assert first_line(process)
        told = process.stderr.read()
    assert (process.returncode, endless.returncode) == (0, -signal.SIGPIPE)
    assert b"pomona" not in told


@every_stream
def test_two_commands_in_a_pipe(name: str, start: Any) -> None:
    with start(next(other for other in STREAMS if other != name)) as first, start(name, stdin=first.stdout) as second:
        first.stdout.close()
        stdout, stderr = second.communicate()
    assert (first.returncode, second.returncode, stdout.count(b"\n")) == (0, 0, len(RECORDS)), stderr


@every_stream
def test_a_full_disk_is_code_6_in_one_line(name: str, start: Any) -> None:
    with Path("/dev/full").open("wb", 0) as full, start(name, "-q", stdout=full) as process:
        told = process.stderr.read()
    assert process.returncode == 6
    assert told.splitlines() == [
        f"pomona {name}: error: cannot write standard output: no space left on the device".encode()
    ]


@pytest.mark.parametrize("args", ["--help", "--version", *(f"{c.name} --help" for c in COMMANDS)])
def test_help_survives_closed_and_full_ends(args: str, tmp_path: Path) -> None:
    line = f"'{sys.executable}' -m pomona_cli {args}"
    done = shell(f"{line} > /dev/full", tmp_path)
    assert done.returncode == 6 and len(done.stderr.splitlines()) == 1, done.stderr
    done = shell(f"{line} | true; echo ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.stdout, done.stderr) == (b"0\n", b"")


@every_stream
def test_without_standard_error_it_still_works(name: str, start: Any) -> None:
    with Path("/dev/full").open("wb", 0) as full, start(name, stderr=full) as process:
        written = process.stdout.read()
    assert (process.returncode, written.count(b"\n")) == (0, len(RECORDS))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * SPECIMENS[n].heavy) for n in STREAMS])
def test_in_make_a_failed_command_leaves_no_target(name: str, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(RECORDS) + b"{broken\n")
    (tmp_path / "Makefile").write_text(
        f"out.jsonl: in.jsonl\n\t{invocation(name, tmp_path, tiny_model)} -o $@ --resume < $<\n"
    )
    done = shell("make out.jsonl", tmp_path)
    assert done.returncode == 2 and b"Error 4" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()
    (tmp_path / "in.jsonl").write_bytes(jsonl(RECORDS))
    assert shell("make out.jsonl && make out.jsonl", tmp_path).returncode == 0


@every_stream
def test_no_input_on_a_terminal_asks_for_one(name: str, tmp_path: Path, tiny_model: Path) -> None:
    import os
    import pty

    main, other = pty.openpty()
    options = SPECIMENS[name].options(tmp_path, tiny_model)
    done = subprocess.run(command(name, *options), stdin=other, capture_output=True, timeout=60)
    os.close(main)
    os.close(other)
    assert done.returncode == 2 and b"no input" in done.stderr


def test_closed_streams_are_like_the_null_device(tmp_path: Path) -> None:
    from methods.mera_merge.adapterhub import make_bottleneck

    adapter = make_bottleneck(tmp_path / "one", seed=1)
    line = " ".join(f"'{word}'" for word in command("mera-merge", adapter, "-o", "out"))
    for number, closed in enumerate((">&-", "2>&-", "<&- >&- 2>&-")):
        done = shell(f"{line}{number} {closed}", tmp_path)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
        assert {path.name for path in (tmp_path / f"out{number}").iterdir()} >= {"manifest.json", "adapter.safetensors"}
