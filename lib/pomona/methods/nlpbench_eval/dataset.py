"""Questions: our own JSONL schema, the two official files, and everything that can be wrong with either.

One question is one line; questions that share a context are a group and are asked in the order of their turns. The
official release has two JSON arrays without ids, `wo_ctx.json` (a question an element) and `w_ctx.json` (a group an
element, parallel lists inside); they are recognised by their content and get their ids from their position.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pomona.errors import DataError
from pomona.io.records import Digest, read
from pomona.methods.nlpbench_eval.questions import CATEGORIES, Question
from pomona.methods.nlpbench_eval.reading import QuestionReader

OFFICIAL_MARGINS: dict[str, dict[str, int]] = {
    "questions": {"all": 378},
    "type": {"sa": 192, "mc": 159, "math": 27},
    "context": {"with": 169, "without": 209},
    "category": {"lmsp": 162, "ai": 75, "sl": 69, "ot": 32, "irtm": 27, "pdda": 13},
    "type/context": {
        "sa/with": 130,
        "mc/with": 15,
        "math/with": 24,
        "sa/without": 62,
        "mc/without": 144,
        "math/without": 3,
    },
}
"""Paper table 1. The number of groups is not stated, so it is not checked."""

_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Dataset:
    """Questions in order, those of a group side by side, and where they came from."""

    questions: tuple[Question, ...]
    sources: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()

    def groups(self) -> list[tuple[Question, ...]]:
        """The conversations to have: each group's turns, each other question by itself."""
        found: dict[str, list[Question]] = {}
        for question in self.questions:
            found.setdefault(f"g {question.group}" if question.group is not None else f"q {question.id}", []).append(
                question
            )
        return [tuple(turns) for turns in found.values()]

    def sha256(self) -> str:
        """A digest of what is asked and what is right; unknown fields and the layout of the file aside."""
        digest = hashlib.sha256()
        for q in self.questions:
            asked = [q.group is not None, q.turn, q.context, q.type, q.question, q.options, q.answer, q.category]
            digest.update(json.dumps([q.id, *asked, q.unique, q.solution]).encode() + b"\n")
        return digest.hexdigest()

    def margins(self) -> dict[str, dict[str, int]]:
        """Counts by type, context and category, in the shape of `OFFICIAL_MARGINS`."""
        kinds = [("with" if q.context is not None else "without", q.type, q.category) for q in self.questions]
        return {
            "questions": {"all": len(kinds)},
            "type": dict(Counter(kind for _, kind, _ in kinds)),
            "context": dict(Counter(context for context, _, _ in kinds)),
            "category": dict(Counter(category for _, _, category in kinds)),
            "type/context": dict(Counter(f"{kind}/{context}" for context, kind, _ in kinds)),
        }


def load(inputs: Sequence[str], *, other_categories: bool = False) -> Dataset:
    """The questions of `inputs`, checked.

    Args:
        other_categories: accept categories besides `CATEGORIES`.

    Raises:
        MissingError: an input is not there.
        DataError: anything is wrong; the message lists each problem as ``source:line: field: what``.
    """
    digests: list[Digest] = []
    reader = QuestionReader(other_categories)
    for item in read(inputs, digests=digests):
        reader.take(item)
    questions = reader.finish()
    if reader.problems:
        shown = reader.problems[:_SHOWN_PROBLEMS]
        rest = len(reader.problems) - len(shown)
        more = [f"and {rest} more"] if rest else []
        raise DataError("; ".join([*shown, *more]), hint=f"{len(reader.problems)} problems found")
    if not questions:
        raise DataError("the input holds no question")
    return Dataset(questions, tuple(digest.as_dict() for digest in digests), tuple(reader.warnings))


def official_problems(dataset: Dataset) -> list[str]:
    """Where the counts of `dataset` differ from the paper's table 1."""
    found = dataset.margins()
    return [
        f"{name} {key}: {found[name].get(key, 0)}, expected {count}"
        for name, expected in OFFICIAL_MARGINS.items()
        for key, count in expected.items()
        if found[name].get(key, 0) != count
    ]


def select(
    dataset: Dataset,
    *,
    types: Iterable[str] = (),
    categories: Iterable[str] = (),
    context: str = "all",
    ids: Iterable[str] | None = None,
    limit: int | None = None,
) -> Dataset:
    """The part of `dataset` that fits every filter; `limit` counts questions and keeps groups whole.

    A filter may take turns out of a group; those left keep their order.

    Raises:
        DataError: an id or a category that no question has, or nothing is left.
    """
    chosen_types, chosen_categories = set(types), set(categories)
    wanted = None if ids is None else set(ids)
    if wanted and (unknown := sorted(wanted - {q.id for q in dataset.questions})):
        raise DataError(f"no question has the id {unknown[0]!r} ({len(unknown)} such ids)")
    if unknown := sorted(chosen_categories - CATEGORIES.keys() - {q.category for q in dataset.questions}):
        raise DataError(f"no question has the category {unknown[0]!r}", hint=f"there are {', '.join(CATEGORIES)}")
    kept = [
        q
        for q in dataset.questions
        if (not chosen_types or q.type in chosen_types)
        and (not chosen_categories or q.category in chosen_categories)
        and (context == "all" or (q.context is not None) == (context == "with"))
        and (wanted is None or q.id in wanted)
    ]
    part = Dataset(tuple(kept), dataset.sources, dataset.warnings)
    if limit is not None:
        whole: list[Question] = []
        for turns in part.groups():
            if len(whole) >= limit:
                break
            whole += turns
        part = Dataset(tuple(whole), dataset.sources, dataset.warnings)
    if not part.questions:
        raise DataError("no question is left to ask", hint="the filters and --limit leave none")
    return part
