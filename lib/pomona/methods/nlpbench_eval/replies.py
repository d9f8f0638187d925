"""Questions and replies as a report shows them: what was asked, what came back, what was read from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

from pomona.methods.nlpbench_eval.arms import Arm
from pomona.methods.nlpbench_eval.conversation import SCORED
from pomona.report.text import one_line

Line = Mapping[str, Any]
"""A line of `answers.jsonl`."""

WITHHELD = "(withheld)"


class Fate(NamedTuple):
    """What became of a question: told by symbol and word, for `kind` may only add a colour."""

    kind: Literal["right", "wrong", "unanswered", "unscored"]
    symbol: str
    word: str
    detail: str = ""

    @property
    def short(self) -> str:
        return f"{self.symbol} {self.word}"

    def __str__(self) -> str:
        return f"{self.short}{f' ({self.detail})' if self.detail else ''}"


class Question(NamedTuple):
    """One question and each arm's line of it, None where an arm has none."""

    asked: Line
    replies: tuple[Line | None, ...]


def groups(arms: Sequence[Arm]) -> Iterator[list[Question]]:
    """The questions in the order of the data, those of one context together."""
    lines = [{str(line["id"]): line for line in arm.answers} for arm in arms]
    ids = dict.fromkeys(i for arm in lines for i in arm)
    questions = [Question(next(arm[i] for arm in lines if i in arm), tuple(arm.get(i) for arm in lines)) for i in ids]
    for _, together in groupby(questions, lambda q: q.asked.get("group") or ("", q.asked["id"])):
        yield list(together)


def read(line: Line, reading: str) -> Line:
    """What the `reading` made of a reply; empty where there is none."""
    return line.get(reading) or {}


def scored(line: Line) -> bool:
    return line.get("state") in SCORED and read(line, "lenient").get("correct") is not None


def fate(line: Line | None, reading: str) -> Fate:
    """What became of a question by this reading."""
    if line is None:
        return Fate("unanswered", "∅", "not asked")
    state = str(line.get("state"))
    if state not in SCORED:
        return Fate("unanswered", "∅", "no answer", one_line(state, 24).replace("_", " "))
    how = "" if state == "ok" else state
    correct = read(line, reading).get("correct")
    if correct is None:
        why = str((line.get("judgement") or {}).get("status") or "undecided").replace("_", " ")
        return Fate("unscored", "?", "not scored", one_line(f"{why}, {how}" if how else why, 40))
    return Fate("right", "✓", "right", how) if correct else Fate("wrong", "✗", "wrong", how)


def parsed(line: Line, reading: str) -> str:
    """What was read from the reply, and whether it is right."""
    told = read(line, reading)
    value = told.get("parsed")
    if line.get("type") == "sa":
        value = ""
    elif value is None:
        value = "nothing readable"
    elif isinstance(value, Mapping):
        value = WITHHELD
    elif isinstance(value, list | tuple):
        value = ", ".join(str(v) for v in value)
    correct = {True: "✓ right", False: "✗ wrong", None: "? not scored"}[told.get("correct")]
    return f"{one_line(str(value), 80)} {correct}".strip()


def text(line: Line, key: str) -> str | None:
    """The text under `key`; a placeholder where it was withheld, None where there is none."""
    value = line.get(key, WITHHELD)
    if value is None:
        return None
    return WITHHELD if isinstance(value, Mapping) else str(value)


def context(line: Line) -> str | None:
    """What a question refers to; a question outside a group has none."""
    return text(line, "context") if line.get("group") is not None or "context" in line else None


def options(line: Line) -> list[str]:
    """The options of a multiple-choice question."""
    if line.get("type") != "mc":
        return []
    value = line.get("options")
    return [str(option) for option in value] if isinstance(value, list | tuple) else [WITHHELD]


def gold(line: Line) -> str:
    """The right answer: for multiple choice index and text of each right option."""
    value = line.get("gold")
    if value is None or isinstance(value, Mapping):
        return WITHHELD
    if not isinstance(value, list | tuple):
        return str(value)
    if line.get("type") == "mc":
        named = dict(enumerate(options(line)))
        return "; ".join(f"{v}: {named[v]}" if named.get(v, WITHHELD) != WITHHELD else str(v) for v in value)
    return " or ".join(str(v) for v in value)


def reply(line: Line) -> str:
    """The model's final reply."""
    value = text(line, "answer")
    return "(no reply)" if value is None or value == "" else value


def judgement(line: Line) -> str | None:
    """The judge's verdict and reason, where there was a judge."""
    told = line.get("judgement")
    if not told:
        return None
    verdict = {True: "right", False: "wrong"}.get(told.get("verdict"), str(told.get("status") or "no verdict"))
    reason = told.get("reason", WITHHELD)
    reason = WITHHELD if isinstance(reason, Mapping) else str(reason or "")
    by = f" ({one_line(str(told['by']), 60)})" if told.get("by") else ""
    return f"{verdict.replace('_', ' ')}{by}{': ' if reason else ''}{reason}"


def notes(line: Line) -> list[str]:
    """The votes, the overlap and the cost of a reply, a phrase each."""
    told = []
    if votes := line.get("votes"):
        tied = ", tied" if votes.get("tied") else ""
        told.append(f"vote share {votes['share']:.2f}{tied}")
    overlap = line.get("overlap") or {}
    told += [
        f"{name} {overlap[k]:.2f}"
        for k, name in (("rouge_l", "ROUGE-L"), ("bleu", "BLEU"))
        if overlap.get(k) is not None
    ]
    if line.get("finish_reason") not in (None, "stop"):
        told.append(f"finish reason {one_line(str(line['finish_reason']), 24)}")
    if line.get("prompt_tokens") is not None and line.get("completion_tokens") is not None:
        told.append(f"{line['prompt_tokens']:,} + {line['completion_tokens']:,} tokens")
    if (line.get("calls") or 1) > 1:
        told.append(f"{line['calls']} calls")
    return told


def samples(line: Line) -> list[str]:
    """What was put to the vote."""
    value = (line.get("votes") or {}).get("samples")
    if isinstance(value, Mapping):
        return [WITHHELD]
    return [WITHHELD if isinstance(v, Mapping) else str(v) for v in value or []]


def thoughts(line: Line) -> list[str]:
    """The steps before the reply."""
    value = line.get("thoughts")
    if isinstance(value, Mapping):
        return [WITHHELD]
    return [WITHHELD if isinstance(v, Mapping) else str(v) for v in value or []]


def excerpt(whole: str, room: int) -> tuple[str, str | None]:
    """`whole` cut to `room` characters, with a note where that left something out."""
    if len(whole) <= room:
        return whole, None
    return whole[:room], f"Cut here: {room:,} of {len(whole):,} characters shown; answers.jsonl has the rest."
