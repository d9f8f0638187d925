"""Programs that need the package `adapters`, which cannot be installed beside the transformers of this one."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import orjson
import pytest

INTERPRETER = "POMONA_ADAPTERS_PYTHON"


def run(program: str, *arguments: object) -> Any:
    """What `program` prints as JSON in its last line, run by an interpreter that has `adapters`; skips without one."""
    python = os.environ.get(INTERPRETER)
    if not python:
        pytest.skip(f"{INTERPRETER} names no interpreter that has adapters 1.3 (pip install adapters)")
    done = subprocess.run(
        [python, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return orjson.loads(done.stdout.splitlines()[-1])
