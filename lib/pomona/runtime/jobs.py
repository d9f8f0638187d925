"""Independent pieces of work, side by side in processes of one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from pomona.errors import PomonaError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Read when a library is first imported; and the tracker of semaphores is not to warn of those that a signal leaves.
_SURROUNDINGS = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "PYTHONWARNINGS": "ignore",
}


def side_by_side(task: Callable[[Item], Result], items: Sequence[Item], jobs: int) -> Iterator[tuple[Item, Result]]:
    """Each item with ``task(item)``, as they are done; the same results for any number of jobs.

    With one job the work is done here, otherwise in that many new processes, which need `task`, items and results to
    be picklable, and which end with this one however it ends.

    Raises:
        PomonaError: a process ended before its work was done, for want of memory as a rule.
    """
    if jobs == 1 or len(items) < 2:
        with one_thread():
            for item in items:
                yield item, task(item)
        return
    before = {name: os.environ.get(name) for name in _SURROUNDINGS}
    os.environ.update(_SURROUNDINGS)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(jobs, len(items)), multiprocessing.get_context("spawn"), _begin)
    try:
        yield from _finished(pool, task, items)
    except BrokenProcessPool as error:
        raise PomonaError(
            "a process of --jobs was killed before its work was done",
            hint="the machine may be out of memory: try fewer jobs; --resume goes on from here",
        ) from error
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()


def _finished(
    pool: ProcessPoolExecutor, task: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    waiting: dict[Future[Result], Item] = {pool.submit(task, item): item for item in items}
    while waiting:
        done, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            yield waiting.pop(future), future.result()


class one_thread:
    """Numerical libraries compute in one thread inside the block, so that sums are made in one order."""

    def __enter__(self) -> None:
        import torch
        from threadpoolctl import threadpool_limits

        self._torch = torch.get_num_threads()
        torch.set_num_threads(1)
        self._limits = threadpool_limits(1)

    def __exit__(self, *_: object) -> None:
        import torch

        self._limits.restore_original_limits()
        torch.set_num_threads(self._torch)


def _begin() -> None:
    """In a new process: leave Ctrl-C to the parent, compute in one thread, and end when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
