"""The options of the study as values, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pomona.errors import UsageError

TASKS = ("mqar", "induction", "copy")

MOST_PAIRS = 64
"""Sequences have four tokens for each pair, and models hold whole attention matrices."""


@dataclass(frozen=True)
class RecallOptions:
    """The tasks, and the small models that learn them."""

    panel: ClassVar[str] = "Recall"

    task: Annotated[str, "mqar, induction or copy; several by comma"] = "mqar"
    pairs: Annotated[str, "key-value pairs to remember, by comma; sequences are four times as long"] = "4,8,16"
    feature_dim: Annotated[int, "width of queries and keys in the small models"] = 16
    vocabulary: Annotated[int, "tokens of the synthetic tasks, an even number"] = 64
    steps: Annotated[int, "most training steps of each small model"] = 2000
    seeds: Annotated[int, "models trained for each kernel, task and number of pairs"] = 3

    def __post_init__(self) -> None:
        tasks(self.task)
        check_sizes(self.vocabulary, max(pairs(self.pairs)), self.feature_dim, self.steps, self.seeds)


def tasks(text: str) -> list[str]:
    """The tasks of a list by comma, each once.

    Raises:
        UsageError: one is unknown, or there is none.
    """
    found = list(dict.fromkeys(_parts(text)))
    for task in found:
        if task not in TASKS:
            raise UsageError(f"--task {task}: expected {', '.join(TASKS)}, or several by comma")
    if not found:
        raise UsageError("--task names no task", hint=f"give {', '.join(TASKS)}, or several by comma")
    return found


def pairs(text: str) -> list[int]:
    """Numbers of pairs by comma, ascending, each once.

    Raises:
        UsageError: one is no whole number from 1 to `MOST_PAIRS`, or there is none.
    """
    found = set()
    for part in _parts(text):
        if not (re.fullmatch("[0-9]{1,9}", part) and 1 <= int(part) <= MOST_PAIRS):
            raise UsageError(f"--pairs {part}: give whole numbers from 1 to {MOST_PAIRS} by comma, as 4,8,16")
        found.add(int(part))
    if not found:
        raise UsageError("--pairs names no number", hint="give numbers by comma, as 4,8,16")
    return sorted(found)


def check_sizes(vocabulary: int, most: int, feature_dim: int, steps: int, seeds: int) -> None:
    """Refuse what no task or model can be made of.

    Args:
        most: the largest number of pairs.

    Raises:
        UsageError: with what to give instead.
    """
    if vocabulary % 2:
        raise UsageError(
            f"--vocabulary is {vocabulary}: keys are its lower half, values its upper half",
            hint=f"give an even number, as --vocabulary {vocabulary + 1}",
        )
    if vocabulary < 2 * most:
        raise UsageError(
            f"--vocabulary {vocabulary} is too small for {most} pairs, whose keys and values all differ",
            hint=f"give --vocabulary {2 * most} or more, or fewer --pairs",
        )
    for option, value, least, greatest in (
        ("vocabulary", vocabulary, 4, 65_536),
        ("feature-dim", feature_dim, 1, 256),
        ("steps", steps, 2, 10**6),
        ("seeds", seeds, 1, 1000),
    ):
        if not least <= value <= greatest:
            raise UsageError(f"--{option} is {value}; give {least} to {greatest}")


def _parts(text: str) -> list[str]:
    return [part for part in map(str.strip, text.split(",")) if part]
