"""Where work runs: the only module that builds an Accelerator.

On a CPU a forward pass runs on one thread, and several run side by side. That is faster for small batches than sharing
one pass among threads, and it makes every result independent of the number of threads and processes: batches are
planned from the data alone, and each is computed by one thread from beginning to end.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from pomona.errors import UnavailableError, UsageError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Task = Callable[[Any], Any]


@dataclass
class Runtime:
    """A device, a number format, and the processes and threads that share the work.

    Attributes:
        why: what decided device and number format, for people.
        threads: forward passes that run side by side in this process; 1 on an accelerator.
    """

    accelerator: Any
    device: torch.device
    dtype: torch.dtype
    why: str
    threads: int
    rank: int = 0
    world: int = 1
    _tasks: dict[str, Task] = field(default_factory=dict, repr=False)
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)

    _opened: ClassVar[dict[str, Any]] = {}

    @classmethod
    def open(cls, device: str = "auto", dtype: str = "auto", seed: int = 0) -> Runtime:
        """Find the device and seed everything.

        Args:
            device: auto, cpu, cuda, cuda:N or mps.
            dtype: auto, float32, bfloat16 or float16; auto is bfloat16 where the hardware computes in it.

        Raises:
            UsageError: an unknown device or number format.
            UnavailableError: this machine lacks the device.
        """
        _probe(device)
        accelerator = cls._accelerator(device)
        place: torch.device = accelerator.device
        chosen, why = _dtype(dtype, place)
        torch.manual_seed(seed)
        threads = 1
        if place.type == "cpu":
            threads = _threads(accelerator.num_processes)
            torch.set_num_threads(1)
        return cls(
            accelerator, place, chosen, f"{place}, {why}", threads, accelerator.process_index, accelerator.num_processes
        )

    @classmethod
    def _accelerator(cls, device: str) -> Any:
        """The one Accelerator of this process; its state is a singleton that refuses a second construction."""
        from datetime import timedelta

        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        if cls._opened.get("device", device) != device:
            raise UsageError(f"this process already runs on {cls._opened['device']}, not on {device}")
        if "accelerator" not in cls._opened:
            # Accelerate joins processes on a CPU only when told that it is to be a CPU.
            cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
            if device not in ("auto", "cpu", "cuda"):  # "cuda" would put every process of a launch on the first GPU
                os.environ["ACCELERATE_TORCH_DEVICE"] = device
            # The other processes wait as long as the main one trains, or waits for input itself.
            patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
            cls._opened.update(device=device, accelerator=Accelerator(cpu=cpu, kwargs_handlers=[patience]))
            if torch.distributed.is_initialized():
                # Left to the interpreter's end, the group's threads can abort the process after its work is done.
                atexit.register(torch.distributed.destroy_process_group)
        return cls._opened["accelerator"]

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def register(self, name: str, task: Task) -> None:
        """Give `task` a name by which the other processes know it."""
        self._tasks[name] = task

    def map(self, name: str, items: Sequence[Any]) -> list[Any]:
        """Results of the task `name` for each item, in order; called by the main process alone.

        With several processes, process r takes items r, r + world, ...; within a process, threads take them as they
        become free. The task must be safe to run in several threads, as forward passes without gradients are.
        """
        if self.world == 1:
            return self._own(name, items)
        _broadcast([name, list(items)])
        gathered: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(gathered, self._own(name, items[:: self.world]))
        return [gathered[index % self.world][index // self.world] for index in range(len(items))]

    def serve(self) -> None:
        """In every process but the main one: do this process's share of each `map` until the main one calls `close`."""
        while True:
            name, items = _broadcast([None, None])
            if name is None:
                return
            share = self._own(name, items[self.rank :: self.world])
            torch.distributed.all_gather_object([None] * self.world, share)

    def close(self) -> None:
        """Let the other processes end; does nothing when there are none."""
        if self.world > 1 and self.is_main:
            _broadcast([None, None])

    def _own(self, name: str, items: Sequence[Any]) -> list[Any]:
        task = self._tasks[name]
        if self.threads == 1 or len(items) < 2:
            return [task(item) for item in items]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, "forward", initializer=torch.set_num_threads, initargs=(1,))
        futures = [self._pool.submit(task, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def describe() -> Iterator[dict[str, object]]:
    """The devices of this machine, for ``pomona env``."""
    yield {"name": "cpu", "threads": _threads(1), "bfloat16": _cpu_computes_bfloat16()}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield {
            "name": f"cuda:{number}",
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "bfloat16": properties.major >= 8,
        }
    if torch.backends.mps.is_available():
        yield {"name": "mps", "bfloat16": False}


def _probe(device: str) -> None:
    """Accelerate accepts a device that is not there and fails later; find out now."""
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (number and (kind != "cuda" or not number.isdecimal())):
        raise UsageError(f"--device {device}: expected auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found <= int(number or 0):
            what = f"it has {found} CUDA device{'s' * (found != 1)}" if found else "torch sees no CUDA device here"
            raise UnavailableError(f"--device {device}: {what}", hint="--device cpu works everywhere")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UnavailableError("--device mps: torch sees no Metal device here", hint="--device cpu works everywhere")


def _dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    if name != "auto":
        if name not in _DTYPES:
            raise UsageError(f"--dtype {name}: expected auto, {', '.join(_DTYPES)}")
        return _DTYPES[name], f"{name} as asked"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return torch.bfloat16, "bfloat16, which the GPU computes in"
    if device.type == "cpu" and _cpu_computes_bfloat16():
        return torch.bfloat16, "bfloat16, which the processor computes in"
    return torch.float32, "float32, as the hardware does not compute in bfloat16"


def _cpu_computes_bfloat16() -> bool:
    """AVX512-BF16 or AMX; elsewhere bfloat16 is emulated and slower than float32."""
    return any(getattr(torch.cpu, probe, bool)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def _threads(processes: int) -> int:
    wanted = os.environ.get("POMONA_THREADS") or os.environ.get("OMP_NUM_THREADS")
    if wanted and wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    # Linux alone tells which processors a process may use.
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // processes)


def _broadcast(objects: list[Any]) -> list[Any]:
    torch.distributed.broadcast_object_list(objects, src=0)
    return objects
