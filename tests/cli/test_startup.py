"""Help is quick because nothing heavy is imported for it."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from specimens import COMMANDS

HEAVY = "accelerate datasets matplotlib numpy openai pandas pyarrow scipy sklearn torch transformers".split()
INVOCATIONS = [["--help"], ["--version"], *([command.name, "--help"] for command in COMMANDS)]

PROBE = """
import sys
from pomona_cli.main import main
sys.argv = ["pomona", *{args!r}]
try:
    main()
except SystemExit as end:
    print([name for name in {heavy!r} if name in sys.modules], end.code, file=sys.stderr)
"""


@pytest.mark.parametrize("args", INVOCATIONS, ids=" ".join)
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = PROBE.format(args=args, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[] 0"
    assert done.stdout


@pytest.mark.parametrize("args", INVOCATIONS, ids=" ".join)
def test_help_stays_within_its_budget_of_processor_time(args: list[str]) -> None:
    budget = 0.150 if args[0].startswith("-") else 0.250
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "pomona_cli", *args], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 2 * budget  # twice, because a shared machine counts generously
    print(f"pomona {' '.join(args)}: {min(spent) * 1000:.0f} ms of processor time, budget {budget * 1000:.0f} ms")
