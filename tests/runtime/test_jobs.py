"""Work side by side: the same results, no process left behind, no process lost unnoticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pomona.errors import PomonaError
from pomona.runtime.jobs import side_by_side

# Spawned processes import the task by name, which a test module collected by importlib mode does not have.
from work_items import die, digest, fail, threads


def test_results_are_those_of_one_process_whatever_the_number_of_jobs() -> None:
    items = list(range(6))
    alone = dict(side_by_side(digest, items, 1))
    assert alone == dict(side_by_side(digest, items, 2)) == {n: digest(n) for n in items}
    assert len(set(alone.values())) == len(items)


@pytest.mark.parametrize("jobs", [1, 2])
def test_work_is_done_in_one_thread_and_the_caller_keeps_its_own(jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    try:
        assert {found for _, found in side_by_side(threads, [0, 1], jobs)} == {(1, 1)}
        assert torch.get_num_threads() == 3 and os.environ["OMP_NUM_THREADS"] == "3"
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_of_the_work_is_the_callers(jobs: int) -> None:
    with pytest.raises(PomonaError, match="item 1 is bad"):
        list(side_by_side(fail, [0, 1, 2], jobs))


def test_a_process_that_is_killed_is_told_with_a_way_on() -> None:
    with pytest.raises(PomonaError, match="killed before its work was done") as caught:
        list(side_by_side(die, [0, 1], 2))
    assert "--resume" in (caught.value.hint or "")


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    script = (
        "from pomona.runtime.jobs import side_by_side\n"
        "from work_items import wait_in\n"
        f"list(side_by_side(wait_in, [{str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}], 2))\n"
    )
    (tmp_path / "main.py").write_text(f"if __name__ == '__main__':\n    {script.replace(chr(10), chr(10) + '    ')}\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    main = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], env=env)
    files = [tmp_path / "a", tmp_path / "b"]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert main.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    workers = [int(file.read_text()) for file in files]
    main.send_signal(signal.SIGKILL)
    main.wait()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_that_is_killed_leaves_nobody_to_complain(tmp_path: Path) -> None:
    script = "import os\nfrom pomona.runtime.jobs import side_by_side\n"
    script += "for _ in side_by_side(abs, [1, 2, 3], 2):\n    os.kill(os.getpid(), 9)\n"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL and done.stderr == b""


def test_sums_do_not_depend_on_the_threads_of_the_caller() -> None:
    torch.set_num_threads(2)
    try:
        found = dict(side_by_side(digest, [7], 1))
    finally:
        torch.set_num_threads(1)
    assert found == {7: digest(7)}
