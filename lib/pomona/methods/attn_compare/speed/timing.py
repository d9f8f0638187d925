"""How long work takes, measured so that contenders can be compared on a machine that does other things meanwhile.

Contenders take turns, so that a busy moment hits them alike; wall and processor time are both kept. A group of timings
is noisy where the slowest of a contender's repeats took more than 1.5 times the fastest, or the load was above the
number of cores; then processor time at one thread stands for the group. On a GPU, events on its stream are the clock.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch

NOISE = 1.5
SAMPLE = 0.005  # seconds: shorter work is repeated within a sample until it takes as long
LONG = 0.3  # seconds: what takes longer is not slower for being the first
PATIENCE = 3.0  # seconds for the repeats of one contender; longer work is repeated less, but three times


class Clock(Protocol):
    """Times a function; the timings of tests are made up."""

    cores: int
    device: bool

    def time(self, work: Callable[[], object], times: int) -> tuple[float, float]:
        """Wall (or device) seconds and processor seconds of calling `work` this many times."""

    def load(self) -> float | None:
        """Processes that want to run, on average over the last minute; None where nobody counts."""


class ProcessorClock:
    """Wall time and the processor time of this process."""

    device = False

    def __init__(self) -> None:
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def time(self, work: Callable[[], object], times: int) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(times):
            work()
        return time.perf_counter() - wall, time.process_time() - cpu

    def load(self) -> float | None:
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


class CudaClock(ProcessorClock):
    """Time on the stream of a CUDA device, between events."""

    device = True

    def time(self, work: Callable[[], object], times: int) -> tuple[float, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        cpu = time.process_time()
        begin.record()
        for _ in range(times):
            work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000, time.process_time() - cpu


@dataclass(frozen=True)
class Timing:
    """The repeats of one contender, in seconds for one call.

    Attributes:
        wall: wall time, or time on the device.
        cpu: processor time.
        load: of the machine before and after, the larger.
        crowded: the load was above the number of cores.
        threads: of torch.
        device: `wall` is time on a device, which other processes do not disturb.
    """

    wall: Sequence[float]
    cpu: Sequence[float]
    load: float | None
    crowded: bool
    threads: int
    device: bool = False

    @property
    def noisy(self) -> bool:
        return max(self.wall) / min(self.wall) > NOISE or (self.crowded and not self.device)

    @property
    def steady(self) -> Sequence[float]:
        """The repeats on the clock that a busy machine disturbs least."""
        return self.wall if self.device or self.threads > 1 else self.cpu

    def as_row(self, clock: str) -> dict[str, Any]:
        """As a row's "timing" has it, in milliseconds; `clock` says which of the two counts: wall, cpu or device."""
        used = self.cpu if clock == "cpu" else self.wall
        return {
            "clock": clock,
            "ms": _ms(median(used)),
            "ms_min": _ms(min(used)),
            "ms_all": [_ms(x) for x in used],
            "wall_ms": _ms(median(self.wall)),
            "wall_ms_min": _ms(min(self.wall)),
            "cpu_ms": _ms(median(self.cpu)),
            "cpu_ms_min": _ms(min(self.cpu)),
            "noisy": self.noisy,
            "load": self.load,
            "threads": self.threads,
        }


def clock_for(device: str) -> Clock:
    return CudaClock() if device.startswith("cuda") else ProcessorClock()


def once(work: Callable[[], object], clock: Clock) -> float:
    """Seconds of one call that is warm; a long one need not be made twice to be so."""
    for _ in range(2):
        wall, cpu = clock.time(work, 1)
        seconds = wall if clock.device or torch.get_num_threads() > 1 else min(wall, cpu) or wall
        if seconds > LONG:
            break
    return seconds


def interleaved(contenders: Mapping[str, Callable[[], object]], repeats: int, clock: Clock) -> dict[str, Timing]:
    """Timings of all contenders, which take turns; each is warmed up first."""
    least = {name: max(once(work, clock), 1e-7) for name, work in contenders.items()}
    times = {name: max(1, math.ceil(SAMPLE / seconds)) for name, seconds in least.items()}
    turns = {name: min(repeats, max(3, int(PATIENCE / seconds))) for name, seconds in least.items()}
    before = clock.load()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name, work in contenders.items():
            if turn < turns[name]:
                samples[name].append(clock.time(work, times[name]))
    loads = [load for load in (before, clock.load()) if load is not None]
    load = max(loads, default=None)
    return {
        name: Timing(
            [wall / times[name] for wall, _ in each],
            [cpu / times[name] for _, cpu in each],
            load,
            load is not None and load > clock.cores,
            torch.get_num_threads(),
            clock.device,
        )
        for name, each in samples.items()
    }


def fair(contenders: Mapping[str, Callable[[], object]], repeats: int, clock: Clock) -> tuple[dict[str, Timing], str]:
    """Timings of a group, and the clock that counts for all of it; measured again at one thread where that must be."""
    found = interleaved(contenders, repeats, clock)
    if clock.device:
        return found, "device"
    if not any(timing.noisy for timing in found.values()):
        return found, "wall"
    if torch.get_num_threads() > 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            found = interleaved(contenders, repeats, clock)
        finally:
            torch.set_num_threads(threads)
    return found, "cpu"


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 6)
