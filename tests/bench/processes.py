"""Programs in processes of their own: the environments that peers need, and what a run costs."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = 0.02  # seconds between two looks at a process's memory


def interpreter(variable: str, folder: Path, pinned: Sequence[str]) -> Path:
    """The Python that the environment variable names, or that of `folder`, made by pip unless it is there."""
    if given := os.environ.get(variable):
        return Path(given)
    python = folder.absolute() / "bin/python"
    if not (folder / "complete").exists():
        print(f"installing {', '.join(pinned)} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, symlinks=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *pinned], check=True)
        (folder / "complete").touch()
    return python


def versions(python: Path, names: Sequence[str]) -> dict[str, str]:
    """Of the packages `names` beside `python`."""
    ask = f"import importlib.metadata as m; print(*(m.version(name) for name in {list(names)}))"
    said = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True, env=surroundings())
    return dict(zip(names, said.stdout.split(), strict=True))


def surroundings(*ours: Path, threads: int | None = None) -> dict[str, str]:
    """This process's environment with no way to the net, and on Python's path `ours` alone."""
    kept = {n: v for n, v in os.environ.items() if not n.lower().endswith("_proxy") and n != "PYTHONPATH"}
    kept |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    if threads is not None:
        kept["OMP_NUM_THREADS"] = str(threads)
    return kept | ({"PYTHONPATH": os.pathsep.join(map(str, ours))} if ours else {})


@dataclass(frozen=True)
class Cost:
    """What a finished program took.

    Attributes:
        wall: seconds.
        cpu: seconds of the processor, in the program and in the system for it.
        peak_mb: most resident memory, mapped files included.
        anonymous_mb: most of it that is no page of a file, as far as samples tell.
        out: its standard output.
    """

    wall: float
    cpu: float
    peak_mb: float
    anonymous_mb: float
    out: str


def watched(command: Sequence[object], environment: Mapping[str, str], limit: float = 300.0) -> Cost:
    """Run `command` to its end.

    Peaks are read from /proc while it runs: the one that the system reports of a dead child begins with its parent's.

    Raises:
        RuntimeError: it failed, or took longer than `limit` seconds.
    """
    given = list(map(str, command))
    started = time.perf_counter()
    child = subprocess.Popen(given, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said: dict[str, bytes] = {}
    readers = [
        threading.Thread(target=lambda n=name, p=pipe: said.update({n: p.read()}))
        for name, pipe in (("out", child.stdout), ("err", child.stderr))
    ]
    for reader in readers:
        reader.start()
    peak = anonymous = 0.0
    while True:
        done, status, usage = os.wait4(child.pid, os.WNOHANG)
        wall = time.perf_counter() - started
        if done:
            break
        if wall > limit:
            child.kill()
        memory = _memory(child.pid)
        peak, anonymous = max(peak, memory.get("VmHWM", 0.0)), max(anonymous, memory.get("RssAnon", 0.0))
        time.sleep(SAMPLE)
    child.returncode = os.waitstatus_to_exitcode(status)
    for reader in readers:
        reader.join()
    if child.returncode:
        raise RuntimeError(f"{' '.join(given)} ended with {child.returncode}: {said['err'].decode()[-2000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak, anonymous, said["out"].decode())


def _memory(pid: int) -> dict[str, float]:
    """Lines of /proc/PID/status in MB; none of a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {name: int(kb) * 1024 / 1e6 for name, kb in re.findall(r"^(VmHWM|RssAnon):\s*(\d+) kB$", status, re.M)}


def machine(before: float) -> dict[str, Any]:
    """What figures were taken on; `before` is the load at the start."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(before, 2), round(os.getloadavg()[0], 2)],
        "python": platform.python_version(),
    }


def target(figure: float, asked: float) -> dict[str, Any]:
    """A figure that is not to be above what is asked."""
    return {"figure": float(f"{figure:.6g}"), "asked": asked, "met": figure <= asked}
