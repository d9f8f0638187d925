"""Runs set side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One run.

    Attributes:
        name: its label, unique among the runs compared.
        result: what `result.json` holds.
        answers: the lines of `answers.jsonl`, in the order of the data.
    """

    name: str
    result: Mapping[str, Any]
    answers: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """Two arms on the same `n` questions.

    Attributes:
        both, only_first, only_second, neither: questions answered right by both, by one only, by none.
        difference: second minus first, a share of `n`.
        low, high: its 95 % interval, from a paired bootstrap over groups.
        p_exact, p_mid: McNemar's test, exact and mid-p, two-sided.
        p_holm: the exact p after Holm's correction for all pairs compared.
        verdict: in words, such as "cot better than zs" or "not distinguishable".
    """

    first: str
    second: str
    n: int
    both: int
    only_first: int
    only_second: int
    neither: int
    difference: float
    low: float
    high: float
    p_exact: float
    p_mid: float
    p_holm: float
    verdict: str
