"""The peak is this process's own, and it rises with what is held."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pomona.runtime import memory

CHILD = """
from pomona.runtime.memory import peak
before = peak()
held = b"x" * 50_000_000
assert 45_000_000 < peak() - before < 80_000_000, (before, peak())
print(before)
"""


def test_the_peak_rises_with_what_is_held_and_forgets_the_parent() -> None:
    ballast = bytearray(b"x") * 150_000_000
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 60_000_000 < memory.peak() - len(ballast) // 2


def test_without_a_proc_the_system_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", memory.Path("/nowhere"))
    asked = memory.peak()
    monkeypatch.undo()
    assert asked >= 0.9 * memory.peak()
