"""An output is absent, what it was, or complete, whatever fails at whatever moment."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.storage import room
from pomona.errors import OutputError
from pomona.io.atomic import atomic_directory, atomic_file, locked, writing


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """Make the `number`-th fsync, rename or directory creation fail; returns a counter of all of them."""
    calls = 0

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return guarded

    monkeypatch.setattr(os, "fsync", guard(os.fsync))
    for name in ("replace", "rename", "mkdir"):
        monkeypatch.setattr(Path, name, guard(getattr(Path, name)))
    return lambda: calls


def test_a_full_disk_is_told_in_one_line_also_of_what_waits_in_the_buffer(tmp_path: Path) -> None:
    for size in (1, 100, 10_000, 1_000_000):
        out = tmp_path / "out"
        with room(0), pytest.raises(OutputError, match="the size limit"), atomic_file(out) as file, writing(out):
            file.write(b"x" * size)
            file.write(b"x")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [None, b"old"])
def test_after_any_single_failure_the_file_is_old_or_new(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "out"
    for number in range(1, 20):
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)
        with pytest.MonkeyPatch.context() as patch:
            calls = fail_at(patch, number)
            try:
                with atomic_file(path) as file:
                    file.write(b"new")
            except OutputError:
                pass
            total = calls()
        content = path.read_bytes() if path.exists() else None
        assert content in (before, b"new")
        assert [p.name for p in tmp_path.iterdir() if p != path] == []
        if total < number:
            assert content == b"new" and number == 4
            return
    pytest.fail("no run came through")


def test_after_any_single_failure_the_directory_is_old_or_new_or_set_aside_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for number in range(1, 20):
        for left in tmp_path.iterdir():
            subprocess.run(["rm", "-rf", str(left)], check=True)
        path.mkdir()
        (path / "a").write_text("old")
        with pytest.MonkeyPatch.context() as patch:
            calls = fail_at(patch, number)
            try:
                with atomic_directory(path) as folder:
                    (folder / "a").write_text("new")
                    (folder / "b").write_text("new")
            except OutputError:
                pass
            total = calls()
        held = {p.name: p.read_text() for p in path.iterdir()}
        assert held in ({"a": "old"}, {"a": "new", "b": "new"}), number
        if total < number:
            assert held == {"a": "new", "b": "new"}
            assert list(tmp_path.iterdir()) == [path]
            return
    pytest.fail("no run came through")


def test_an_exception_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "out") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / "absent" / "out", "the folder does not exist"),
        (lambda folder: ((folder / "file").write_text("") and None) or folder / "file" / "out", "not a directory"),
        (lambda folder: folder / ("x" * 300), "the name is too long"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_with_the_reason(tmp_path: Path, make: Any, reason: str) -> None:
    with pytest.raises(OutputError, match=reason), atomic_file(make(tmp_path)):
        pass


def test_a_second_writer_is_refused_and_told_who_holds_the_output(tmp_path: Path) -> None:
    path = tmp_path / "out"
    code = f"""
import sys, time
from pathlib import Path
from pomona.io.atomic import locked
with locked(Path({str(path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match=f"process {holder.pid}"), locked(path):
            pass
    finally:
        holder.kill()
        holder.wait()
    time.sleep(0.05)
    with locked(path):  # the lock ended with its holder
        pass
    assert list(tmp_path.iterdir()) == []
