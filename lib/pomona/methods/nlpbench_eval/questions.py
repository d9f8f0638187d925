"""What a question is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

QuestionType = Literal["mc", "sa", "math"]
TYPES: tuple[QuestionType, ...] = ("mc", "sa", "math")

CATEGORIES = {
    "lmsp": "language modeling, syntax and parsing",
    "ai": "artificial intelligence",
    "sl": "semantics and logic",
    "ot": "other topics",
    "irtm": "information retrieval and topic modeling",
    "pdda": "pragmatics, discourse, dialogue and applications",
}
"""Paper section 2; the official files spell the names out, joined by "and" or commas."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        options: of multiple choice, in order; empty otherwise.
        answer: indices into `options`, sorted; or the accepted forms of a text, the fullest first.
        context: what the whole group refers to.
        group: the group's name, None for a question that stands alone.
        turn: its place in the group, from 0.
        unique: the answer is one definite thing, so that overlap with it means something.
        solution: a worked solution, used by the paper-text profile only.
        extra: fields of the source that mean nothing here.
    """

    id: str
    type: QuestionType
    question: str
    answer: tuple[int, ...] | tuple[str, ...]
    category: str
    options: tuple[str, ...] = ()
    context: str | None = None
    group: str | None = None
    turn: int = 0
    unique: bool = False
    solution: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def gold_text(self) -> str:
        """The answer as a person would write it."""
        return ", ".join(map(str, self.answer)) if self.type == "mc" else str(self.answer[0])
