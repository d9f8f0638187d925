"""A command that starts warm is the command that users start: the same bytes, the same end."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import warm
from conftest import ROOT, command
from specimens import DIRECTORIES, LISTS, RECORDS, SPECIMENS, jsonl

COLD = warm.must_be_cold(command("env"), {"env": warm.SURROUNDINGS})
forking = pytest.mark.skipif(COLD, reason="everything starts cold here (see tests/warm.py)")


def _files(folder: Path) -> dict[str, Any]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    manifests: dict[str, Any] = {n: json.loads(found.pop(n)) for n in [*found] if n.endswith("manifest.json")}
    for manifest in manifests.values():
        manifest.pop("volatile")
    return {**found, **manifests}


def _twice(pomona: Any, folder: Path, *args: str | Path, **more: Any) -> None:
    """Exit code, standard output and error, and every file, of a start from nothing and of a warm one."""
    ends = []
    for cold in (True, False):
        (folder / "out").mkdir()
        done = pomona(*args, cold=cold, **more)
        stdout = [{**json.loads(line), "peak_rss_mb": None, "seconds": None} for line in done.stdout.splitlines()]
        ends.append((done.returncode, stdout, done.stderr, _files(folder / "out")))
        (folder / "out").rename(folder / f"out{cold}")
    assert ends[0] == ends[1] and ends[0][0] == 0 and ends[0][1]


# --- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECIMENS)
def test_a_stream_is_the_same_cold_and_warm(name: str, pomona: Any, tmp_path: Path, tiny_model: Path) -> None:
    options = SPECIMENS[name].options(tmp_path, tiny_model)
    _twice(pomona, tmp_path, name, "-", *options, "-v", "-o", "out/a.parquet", stdin=jsonl(RECORDS))


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_is_the_same_cold_and_warm(name: str, pomona: Any, tmp_path: Path) -> None:
    _twice(pomona, tmp_path, name, *DIRECTORIES[name].quick(tmp_path), "-o", "out/run")


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_the_same_cold_and_warm(name: str, pomona: Any, tmp_path: Path) -> None:
    _twice(pomona, tmp_path, name)


# --- the same process ------------------------------------------------------------------------------------------------


@forking
def test_a_forked_command_is_a_process_of_its_own(tmp_path: Path) -> None:
    words = command("alpagasus-filter", "-", "--ratings", "ratings.jsonl", "-o", "out.jsonl")
    (tmp_path / "ratings.jsonl").write_bytes(jsonl([{"id": "r0", "score": 5}]))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with warm.start(words, cwd=tmp_path, start_new_session=True, **streams) as process:
        assert isinstance(process, warm.Forked) and process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
        there = Path(f"/proc/{process.pid}")
        assert (there / "cwd").readlink() == tmp_path and os.getsid(process.pid) == process.pid
        held = {str(link.readlink()) for link in (there / "fd").iterdir()}
        assert len([name for name in held if name.startswith("pipe:")]) == 3
        assert not [name for name in held if name.startswith("socket:")]
        surroundings = dict(pair.split(b"=", 1) for pair in (there / "environ").read_bytes().split(b"\0") if pair)
        assert surroundings[b"HF_HUB_OFFLINE"] == b"1"
        process.kill()
    assert process.returncode == -signal.SIGKILL and not there.exists()


@forking
@pytest.mark.parametrize(
    ("words", "more"),
    [
        (command("env", "--debug"), {}),
        (command("env", "--help"), {}),
        ([sys.executable, "-P", *command("env")[1:]], {}),
        (command("env"), {"preexec_fn": os.getpid}),
        *((command("env"), {"env": {**os.environ, "HF_HUB_OFFLINE": "1", name: "2"}})
          for name in ("PYTHONPATH", "OMP_NUM_THREADS", "POMONA_HOME", "HF_HOME", "WORLD_SIZE", "ACCELERATE_USE_CPU")),
    ],
)  # fmt: skip
def test_what_is_read_during_imports_starts_cold(words: list[str], more: dict[str, Any]) -> None:
    process = warm.start(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more)
    process.kill()
    process.wait()
    assert type(process) is subprocess.Popen


# --- the server ------------------------------------------------------------------------------------------------------


@forking
def test_a_server_that_fails_is_no_failed_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "_server", functools.cache(warm._server.__wrapped__))
    for _ in range(2):
        warm._server().process.kill()
        with pytest.raises(RuntimeError, match="the warm server"):
            warm.start(command("env"))


@forking
def test_a_server_ends_with_the_tests_that_it_serves() -> None:
    program = "import socket, warm; ours, theirs = socket.socketpair(); ours.close(); warm._serve(theirs)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT / "tests", timeout=60, check=True)
