"""A rating, read off the text of a judge's reply."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

# A line of a reply may be dressed up: Markdown emphasis, headings, quotes, code fences, brackets, JSON-like quoting.
_DECORATION = re.compile(r"[*_`~#>\"'\[\](){}]")
_REASONING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_LABEL_WORDS = "score rating rate rated grade mark value overall assistant response answer output accuracy helpfulness"

_NUMBER = r"(?P<number>[-+]?[0-9]+(?:\.[0-9]+|,[0-9]{1,2})?)"
_OUT_OF = r"(?:\s*(?:/|out\s+of)\s*(?P<most>[0-9]+(?:\.[0-9]+)?))?"
_UNIT = r"(?:\s*(?:points?|stars?))?"
_REST = r"\s*(?:[.,;]?|(?:\.\s)?[-–—:;,]\s+[^0-9]*)"
_LABEL = r"(?P<label>[^\W\d][^\d:=\n]{0,60}?)\s*(?:[:=]|\bis\b|\bof\b)\s*(?:a\s+)?"
_RATED_LINE = re.compile(rf"(?:{_LABEL})?{_NUMBER}{_OUT_OF}{_UNIT}{_REST}", re.IGNORECASE)


def parse_reference(review: str) -> float:
    """The released rule: the first line as a number, else -1. It accepts `nan`, `inf` and numbers off the scale."""
    try:
        return float(review.split("\n")[0])
    except ValueError:
        return -1.0


def parse_robust(
    review: str, *, low: float = 0.0, high: float = 5.0, dimension: str = "accuracy", cut: bool = False
) -> float | None:
    """The one rating that the first line of a reply states, or None.

    Read: a number, alone or after a label (`Score: 4.5`, `Accuracy is 4.5`), a decimal comma, `4.5/5`, `4.5 out of 5`,
    emphasis, leading blank lines, a short remark after a dash or colon. Not read, because it would be a guess: several
    numbers, a maximum other than `high`, a number inside a sentence, a number off the scale.

    Args:
        low, high: ends of the scale, both allowed.
        dimension: its words are accepted as a label.
        cut: the reply ended at its token limit. A whole number at the very end may then be the head of a longer one.
    """
    text = _REASONING.sub("", review)
    lines = [line for line in (_DECORATION.sub(" ", raw).strip() for raw in text.splitlines()) if line]
    if not lines:
        return None
    line = lines[0]
    if line.endswith((":", "=")) and len(lines) > 1:  # a heading, the number below it
        line = f"{line} {lines[1]}"
        lines = lines[1:]
    match = _RATED_LINE.fullmatch(line)
    if match is None:
        return None
    label, number, most = match["label"], match["number"], match["most"]
    if label is not None and not _names_a_rating(label, dimension):
        return None
    if most is not None and float(most) != high:
        return None
    if cut and len(lines) == 1 and most is None and _may_go_on(line, match.end("number"), number):
        return None
    rating = float(number.replace(",", "."))
    return rating if low <= rating <= high else None


@dataclass(frozen=True, slots=True)
class Reader:
    """How replies and stored scores are read in one run: the parser, the scale, the dimension."""

    parser: Literal["robust", "reference"] = "robust"
    low: float = 0.0
    high: float = 5.0
    dimension: str = "accuracy"

    def reply(self, review: str, *, cut: bool = False) -> float | None:
        """The rating a reply states, or None. The released rule's -1, and what is not finite, are no rating."""
        if self.parser == "robust":
            return parse_robust(review, low=self.low, high=self.high, dimension=self.dimension, cut=cut)
        return self.number(parse_reference(review))

    def number(self, score: float) -> float | None:
        """A stored score, or None where it is no rating: -1, not finite, or (unless `reference`) off the scale."""
        if not math.isfinite(score) or score == -1:
            return None
        return score if self.parser == "reference" or self.low <= score <= self.high else None


def first_line(review: str) -> str:
    """The first line of a reply that is not blank, whole but for the white space around it."""
    return next((line.strip() for line in review.splitlines() if line.strip()), "")


def _names_a_rating(label: str, dimension: str) -> bool:
    words = set(re.findall(r"\w+", label.lower()))
    return bool(words & set(_LABEL_WORDS.split())) or bool(words & set(re.findall(r"\w+", dimension.lower())))


def _may_go_on(line: str, end: int, number: str) -> bool:
    """Whether a cut line stops inside its number: `4`, `4.` and `4,` may all have become `4.5`."""
    return line[end:].strip() in {"", ".", ","} and not re.search(r"[.,]", number)
