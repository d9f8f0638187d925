"""What every test may use: the real command in a process of its own, and data that may be absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import warm

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A test run that was started in the background would hand its deafness down to every command it tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("POMONA_SHARED", ROOT.parent / "shared"))


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """The path of a file of the shared reference data; skips the test where it is absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"reference data {name} is not here (set POMONA_SHARED to its folder)")
        return path

    return find


def command(*args: str | Path) -> list[str]:
    """The command line that runs ``pomona`` as a user would."""
    return [sys.executable, "-m", "pomona_cli", *map(str, args)]


@pytest.fixture
def pomona(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Run ``pomona ARGS`` in a process of its own in `tmp_path`; bytes in, bytes out."""

    def go(*args: str | Path, stdin: bytes | None = b"", env: dict[str, str] | None = None, **more: Any) -> Any:
        surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
        return warm.run(command(*args), stdin, env=surroundings, **{"cwd": tmp_path, **more})

    return go


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model in a directory of its own."""
    from tiny import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")
