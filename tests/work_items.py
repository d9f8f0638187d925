"""Pieces of work for tests of processes; they live in a module that new processes can import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from pomona.errors import DataError


def digest(item: int) -> float:
    import torch

    generator = torch.Generator().manual_seed(item)
    return float(torch.randn(100_001, generator=generator).sum())


def threads(item: int) -> tuple[int, int]:
    import numpy  # noqa: F401  (its library is asked below)
    import torch
    from threadpoolctl import threadpool_info

    return torch.get_num_threads(), max(pool["num_threads"] for pool in threadpool_info())


def fail(item: int) -> int:
    if item == 1:
        raise DataError("item 1 is bad")
    return item


def die(item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_in(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)
