"""The peak of memory that a pass adds to what its inputs take.

On a GPU the allocator knows it. On a processor a fresh process runs the passes one after the other and asks Linux how
far its resident memory rose in each; elsewhere nobody can say.

    python -m pomona.methods.attn_compare.speed.memory     reads what to run as JSON, and answers in JSON
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

LIMIT = 600.0  # seconds, for all passes together
_RESET = Path("/proc/self/clear_refs")


def on_device(work: Callable[[], object]) -> int:
    """Bytes of the CUDA allocator's peak during `work` above what was held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def in_fresh_process(passes: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """Bytes for each of `passes`, settings as `race.prepared` takes them; None where it could not be found out."""
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "pomona.methods.attn_compare.speed.memory"]
    found: list[int | None] = []
    with contextlib.suppress(subprocess.TimeoutExpired, OSError, ValueError):
        said = subprocess.run(
            command, input=json.dumps(list(passes)), capture_output=True, text=True, env=surroundings, timeout=LIMIT
        )
        found = [json.loads(line) for line in said.stdout.splitlines()]
    return [*found, *[None] * len(passes)][: len(passes)]


def rise(work: Callable[[], object]) -> int | None:
    """Bytes by which resident memory rose during `work`, at most; None where the system does not tell."""
    with contextlib.suppress(OSError):
        _give_back()
        _RESET.write_text("5")  # forgets the peak so far: proc(5)
        before = _resident("VmRSS")
        work()
        peak = _resident("VmHWM")
        return max(0, peak - before) if before and peak else None
    return None


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    return 0


def _give_back() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _return_memory_at_once() -> None:
    """Have glibc map what is larger than 64 KiB on its own, so that resident memory falls when a tensor goes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD


def main() -> None:
    from pomona.methods.attn_compare.speed.race import prepared

    _return_memory_at_once()
    torch.set_num_threads(1)
    for settings in json.load(sys.stdin):
        prepared({**settings, "length": min(settings["length"], 128)})[0]()  # loads what is loaded once
        work, held = prepared(settings)
        found = rise(work)
        sys.stdout.write(json.dumps(None if found is None else held + found) + "\n")
        sys.stdout.flush()
        del work


if __name__ == "__main__":
    main()
