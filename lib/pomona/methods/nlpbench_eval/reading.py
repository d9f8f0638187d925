"""Records into questions: our own schema and the two official layouts, and a list of all that is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pomona.io.records import Located, Reject
from pomona.methods.nlpbench_eval.questions import CATEGORIES, TYPES, Question, QuestionType

_FIELDS = {"id", "group", "turn", "context", "type", "question", "options", "answer", "category", "unique", "solution"}
_OFFICIAL_TYPES: dict[int, QuestionType] = {0: "mc", 1: "sa", 2: "math"}
_OFFICIAL_SINGLE = {"question", "type", "options", "answer", "category", "unique_ans"}
_OFFICIAL_GROUP = {"context", "questions", "type", "options", "answers", "category", "unique_ans"}


class QuestionReader:
    """Turns records into questions and keeps a list of all that is wrong, not only the first."""

    def __init__(self, other_categories: bool) -> None:
        self.other_categories = other_categories
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._found: list[tuple[str, Question]] = []
        self._official = Counter[str]()

    def take(self, item: Located | Reject) -> None:
        place = f"{item.source}:{item.line}"
        if isinstance(item, Reject):
            self.problems.append(f"{place}: {item.reason}")
            return
        record = item.record
        if "questions" in record:
            self._group(place, record)
        elif "id" not in record and isinstance(record.get("type"), int):
            number = self._official["wo"]
            self._official["wo"] += 1
            official = {
                "id": f"wo-{number:04d}",
                "type": _OFFICIAL_TYPES.get(record["type"], record["type"]),
                "question": record.get("question"),
                "options": record.get("options") or [],
                "answer": _texts(record.get("answer")),
                "category": _category(record.get("category")),
                "unique": record.get("unique_ans") == 1,
            }
            self._question(place, official, {k: v for k, v in record.items() if k not in _OFFICIAL_SINGLE})
        else:
            own = {k: v for k, v in record.items() if k in _FIELDS}
            extra = {k: v for k, v in record.items() if k not in _FIELDS}
            self._question(place, own, extra)

    def _group(self, place: str, record: Mapping[str, Any]) -> None:
        """One element of the official `w_ctx.json`: a context and parallel lists."""
        number = self._official["w"]
        self._official["w"] += 1
        name = f"w-{number:03d}"
        questions = record.get("questions")
        if not isinstance(questions, list) or not questions:
            self.problems.append(f"{place}: questions: group {number} has no list of questions")
            return
        count = len(questions)
        lists: dict[str, Any] = {
            "type": record.get("type"),
            "options": record.get("options") if record.get("options") is not None else [None] * count,
            "answers": record.get("answers"),
            "category": record.get("category"),
            "unique_ans": record.get("unique_ans") if record.get("unique_ans") is not None else [0] * count,
        }
        for key, values in lists.items():
            if not isinstance(values, list) or len(values) != count:
                length = len(values) if isinstance(values, list) else "no list"
                self.problems.append(f"{place}: {key}: group {number} has {count} questions, but {length} here")
                return
        extra = {k: v for k, v in record.items() if k not in _OFFICIAL_GROUP}
        for turn in range(count):
            kind = lists["type"][turn]
            official = {
                "id": f"{name}-{turn:02d}",
                "group": name,
                "turn": turn,
                "context": record.get("context"),
                "type": _OFFICIAL_TYPES.get(kind, kind) if isinstance(kind, int) else kind,
                "question": questions[turn],
                "options": lists["options"][turn] or [],
                "answer": _texts(lists["answers"][turn]),
                "category": _category(lists["category"][turn]),
                "unique": lists["unique_ans"][turn] == 1,
            }
            self._question(place, official, extra if turn == 0 else {})

    def _question(self, place: str, record: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        before = len(self.problems)

        def problem(name: str, what: str) -> None:
            self.problems.append(f"{place}: {name}: {what}")

        for name in ("id", "question", "category"):
            if not isinstance(record.get(name), str) or not record[name].strip():
                problem(name, "must be a text that is not empty")
        kind, options, answer = record.get("type"), record.get("options") or [], record.get("answer")
        if kind not in TYPES:
            problem("type", f"is {kind!r}, must be one of {', '.join(TYPES)}")
        category = record.get("category")
        if isinstance(category, str) and category not in CATEGORIES and not self.other_categories:
            problem("category", f"is {category!r}, must be one of {', '.join(CATEGORIES)} (or --other-categories)")
        if not isinstance(options, list) or not all(isinstance(o, str) and o.strip() for o in options):
            problem("options", "must be a list of texts that are not empty")
            options = []
        elif kind == "mc" and len(options) < 2:
            problem("options", "multiple choice needs at least two")
        elif kind in ("sa", "math") and options:
            problem("options", f"a question of type {kind} has none")
        given = self._answer(kind, answer, options, problem) if kind in TYPES else None
        group, turn, context = record.get("group"), record.get("turn"), record.get("context")
        if group is not None and not (isinstance(group, str) and group):
            problem("group", "must be a text or null")
        if group is not None and not (type(turn) is int and turn >= 0):
            problem("turn", "must be a whole number from 0 in a group")
        if context is not None and not isinstance(context, str):
            problem("context", "must be a text or null")
        if record.get("solution") is not None and not isinstance(record["solution"], str):
            problem("solution", "must be a text or null")
        if record.get("unique") not in (None, True, False):
            problem("unique", "must be true, false or null")
        if len(self.problems) > before or given is None:
            return
        question = Question(
            id=record["id"],
            type=kind,  # type: ignore[arg-type]  # checked against TYPES above
            question=record["question"],
            answer=given,
            category=record["category"],
            options=tuple(options),
            context=context if context and context.strip() not in ("", "-1") else None,
            group=group,
            turn=turn if group is not None and turn is not None else 0,
            unique=bool(record.get("unique")),
            solution=record.get("solution") or None,
            extra=dict(extra),
        )
        self._found.append((place, question))
        self._look(place, question)

    def _answer(self, kind: Any, answer: Any, options: list[str], problem: Any) -> Any:
        if kind == "mc":
            if not isinstance(answer, list) or not answer or not all(type(i) is int for i in answer):
                problem("answer", "must be a list of option indices")
                return None
            if len(set(answer)) != len(answer):
                problem("answer", f"{answer} repeats an index")
                return None
            if not all(0 <= i < len(options) for i in answer):
                problem("answer", f"{answer} points beyond the {len(options)} options")
                return None
            return tuple(sorted(answer))
        forms = _texts(answer)
        if not isinstance(forms, list) or not forms or not all(isinstance(f, str) and f.strip() for f in forms):
            problem("answer", "must be a text, or a list of texts, that is not empty")
            return None
        return tuple(forms)

    def _look(self, place: str, question: Question) -> None:
        """What is not wrong but worth a look."""
        texts = (question.question, *question.options, *map(str, question.answer), question.context or "")
        if not all(text.isascii() for text in texts):
            self.warnings.append(f"{place}: {question.id}: characters beyond ASCII")
        if len(set(question.options)) != len(question.options):
            self.warnings.append(f"{place}: {question.id}: two options are the same")
        if any(text.count("{") != text.count("}") for text in texts):
            self.warnings.append(f"{place}: {question.id}: braces do not balance")

    def finish(self) -> tuple[Question, ...]:
        """Checks across questions; the questions in input order, groups side by side."""
        first: dict[str, str] = {}
        texts: dict[tuple[str, str | None, tuple[str, ...]], str] = {}
        groups: dict[str, list[tuple[str, Question]]] = {}
        for place, q in self._found:
            if q.id in first:
                self.problems.append(f"{place}: id: {q.id!r} is taken by {first[q.id]}")
            first.setdefault(q.id, place)
            asked = (q.question, q.context, q.options)
            if asked in texts:
                self.warnings.append(f"{place}: {q.id}: the same question as {texts[asked]}")
            texts.setdefault(asked, q.id)
            if q.group is not None:
                groups.setdefault(q.group, []).append((place, q))
        for name, members in groups.items():
            members.sort(key=lambda member: member[1].turn)
            place = members[0][0]
            if [q.turn for _, q in members] != list(range(len(members))):
                turns = ", ".join(str(q.turn) for _, q in members)
                self.problems.append(
                    f"{place}: turn: group {name!r} has the turns {turns}, not 0 to {len(members) - 1}"
                )
            if len({q.context for _, q in members}) > 1:
                self.problems.append(f"{place}: context: group {name!r} has more than one")
        ordered: list[Question] = []
        done: set[str] = set()
        for _, q in self._found:
            if q.group is None:
                ordered.append(q)
            elif q.group not in done:
                done.add(q.group)
                ordered += [member for _, member in groups[q.group]]
        return tuple(ordered)


def _texts(answer: Any) -> Any:
    """A lone text or number as a list of texts; a list of indices stays what it is."""
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return [str(answer)]
    return [answer] if isinstance(answer, str) else answer


def _category(name: Any) -> Any:
    """The short name of an official category, whatever joins its words; anything else unchanged."""
    if not isinstance(name, str) or name in CATEGORIES:
        return name
    words = _words(name)
    return next((short for short, long in CATEGORIES.items() if _words(long) == words), name)


def _words(name: str) -> frozenset[str]:
    letters = "".join(c if c.isalpha() else " " for c in name.lower().replace("modelling", "modeling"))
    return frozenset(letters.split()) - {"and"}
