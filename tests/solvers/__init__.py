"""The exam questions of data/nlpbench solved anew: a function per question that computes its answer from its numbers.

A solver takes the question as it stands in the file and returns a number for math, the right indices for multiple
choice and a short form for short answer. Where possible it goes another way than the worked solution.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from conftest import ROOT

Question = dict[str, Any]
Solver = Callable[[Question], Any]

QUESTIONS: dict[str, Question] = {
    q["id"]: q
    for q in map(json.loads, (ROOT / "data/nlpbench/questions.jsonl").read_text(encoding="utf-8").splitlines())
}
SOLVERS: dict[str, Solver] = {}


def solves(name: str) -> Callable[[Solver], Solver]:
    """Registers the solver of the question `name`."""

    def take(solver: Solver) -> Solver:
        assert name not in SOLVERS
        SOLVERS[name] = solver
        return solver

    return take


def numbers(text: str) -> list[float]:
    """Those that stand by themselves, in order."""
    return [float(number) for number in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)", text)]


def matching(q: Question, fits: Callable[[str], bool]) -> list[int]:
    return [i for i, option in enumerate(q["options"]) if fits(option)]


def verdict(truth: bool) -> list[int]:
    return [0 if truth else 1]
