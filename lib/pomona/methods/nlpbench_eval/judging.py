"""Is a short answer right? A judge model, a person with a spreadsheet, or equality with an accepted form.

A judge sees question, context, gold answer and reply, and does not learn whose reply it is. What it says is a verdict
or it is asked again, held to a JSON schema; a judge that never gives one is a `judge_error`, which is not a wrong
answer. The released code's judge (profile ``released``) sees no context, and whatever is not a 1 is wrong.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pomona.errors import DataError, MissingError
from pomona.methods.nlpbench_eval.conversation import SCORED, Response, Step
from pomona.models.endpoint import Answer, Chain, Request

ASKED = 3
"""How often a judge is asked before it is given up."""
_TOKENS = 256
_RELEASED_TOKENS = 20
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"reason": {"type": "string"}, "verdict": {"type": "string", "enum": ["correct", "incorrect"]}},
        "required": ["reason", "verdict"],
        "additionalProperties": False,
    }
)
_TASK = (
    "You grade an exam in natural language processing. Decide whether the student's answer is correct, going by the "
    "teacher's answer. Wording does not matter, and what the student adds does not matter unless it is wrong; an "
    "answer that contradicts the teacher's, or lacks what the question asks for, is incorrect."
)
_FORM = 'Reply with JSON and nothing else: {"reason": "one sentence", "verdict": "correct" or "incorrect"}'
_AGAIN = f"That could not be read. {_FORM}"
_WORDS = {"correct": True, "incorrect": False, "1": True, "0": False, "true": True, "false": False}
_CELL = 30_000
"""Characters of a text in a cell; spreadsheet programs hold 32,767."""
_CSV_FIELDS = ("id", "verdict", "question", "context", "gold", "answer")


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was decided about one reply.

    Attributes:
        status: ok, unjudged (nobody was asked), or judge_error (nobody gave a verdict).
        verdict: None unless the status is ok.
    """

    by: str
    status: str = "unjudged"
    verdict: bool | None = None
    reason: str = ""
    steps: tuple[Step, ...] = field(default=(), compare=False)


def judge(response: Response, by: str, *, released: bool = False) -> Chain[Judgement]:
    """Ask a judge model about `response`, which has an answer."""
    request = _as_released(response) if released else _request(response)
    steps: list[Step] = []
    said = "no answer"
    for attempt in range(1 if released else ASKED):
        (outcome,) = yield [request]
        steps.append(Step("judge", request, outcome))
        if not isinstance(outcome, Answer):
            return Judgement(by, "judge_error", reason=outcome.reason, steps=tuple(steps))
        if released:
            return Judgement(by, "ok", outcome.text.strip() == "1", steps=tuple(steps))
        verdict, reason = read_verdict(outcome.text)
        if verdict is not None:
            return Judgement(by, "ok", verdict, reason, tuple(steps))
        said = outcome.text
        messages = (*request.messages, ("assistant", outcome.text), ("user", _AGAIN))
        request = Request(messages[:2] + messages[-2:], _TOKENS, sample=attempt + 1, schema=SCHEMA)
    return Judgement(by, "judge_error", reason=f"no verdict in: {said[:200]}", steps=tuple(steps))


def _request(response: Response) -> Request:
    question = response.question
    lines = [f"Question: {question.question}", ""]
    if question.context is not None:
        lines = [f"The question is about this:\n{question.context}", "", *lines]
    accepted = "".join(f"\nAlso accepted: {form}" for form in question.answer[1:])
    lines += [f"Teacher's answer: {question.gold_text}{accepted}", "", f"Student's answer: {response.final}", "", _FORM]
    return Request((("system", _TASK), ("user", "\n".join(lines))), _TOKENS)


def _as_released(response: Response) -> Request:
    question = response.question
    text = (
        f"{_TASK}\nReply with 1 if it is correct, else with 0, and nothing else.\n\nQuestion: {question.question}\n\n"
        f"Teacher's answer: {question.gold_text}\n\nStudent's answer: {response.final}\n\nVerdict:"
    )
    return Request((("user", text),), _RELEASED_TOKENS)


def read_verdict(text: str) -> tuple[bool | None, str]:
    """Verdict and reason of a reply; (None, "") where it gives none that is beyond doubt.

    Read: the JSON asked for, alone or in a code fence or after some prose; or a reply that is one word.
    """
    for match in reversed(list(re.finditer(r"\{[^{}]*\}", text[-4000:]))):
        try:
            entry = json.loads(match[0])
        except ValueError:
            continue
        said = str(entry.get("verdict", "")).strip().lower()
        if said in _WORDS:
            return _WORDS[said], str(entry.get("reason", ""))
    word = text.strip().strip("\"'`*_.!").lower()
    return _WORDS.get(word), ""


def matches(response: Response) -> Judgement:
    """Equality with an accepted form, case, punctuation and articles aside; for answers that are one definite thing."""
    accepted = {_squeezed(str(form)) for form in response.question.answer}
    return Judgement("match", "ok", _squeezed(response.final) in accepted)


def _squeezed(text: str) -> str:
    words = re.findall(r"\w+", text.lower())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


# --- people ----------------------------------------------------------------------------------------------------------


def read_verdicts(path: Path) -> dict[str, bool]:
    """Verdicts by question id from a spreadsheet: columns id and verdict, 1 or 0, yes or no, correct or incorrect.

    Rows without a verdict are passed over.

    Raises:
        MissingError: the file cannot be read.
        DataError: it lacks the columns, repeats an id with another verdict, or holds something else.
    """
    words = {**_WORDS, "yes": True, "no": False, "y": True, "n": False, "right": True, "wrong": False}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingError(f"--verdicts {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    header = text.partition("\n")[0]
    delimiter = ";" if ";" in header and "," not in header else ","  # as spreadsheets of many countries write it
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    found: dict[str, bool] = {}
    try:
        if not {"id", "verdict"} <= set(rows.fieldnames or ()):
            raise DataError(f"--verdicts {path}: needs the columns id and verdict")
        for row in rows:
            said = (row["verdict"] or "").strip().lower()
            if not said:
                continue
            if said not in words:
                raise DataError(f"--verdicts {path}:{rows.line_num}: verdict {said[:40]!r} is neither 1 nor 0")
            if found.setdefault(row["id"], words[said]) != words[said]:
                raise DataError(f"--verdicts {path}:{rows.line_num}: {row['id']!r} has two verdicts")
    except csv.Error as error:
        raise DataError(f"--verdicts {path}:{rows.line_num}: {error}") from error
    return found


def verdict_sheet(responses: Sequence[Response], verdicts: Mapping[str, bool]) -> bytes:
    """The spreadsheet to fill in: a row for each short answer, with the verdicts there are.

    A text that a spreadsheet program would take for a formula is shown with a quote before it.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for response in responses:
        question = response.question
        if question.type != "sa" or response.state not in SCORED:
            continue
        verdict = verdicts.get(question.id)
        cells = {
            "question": question.question,
            "context": question.context or "",
            "gold": "\n".join(map(str, question.answer)),
            "answer": response.text or "",
        }
        writer.writerow(
            {
                "id": question.id,
                "verdict": "" if verdict is None else str(int(verdict)),
                **{name: _cell(text) for name, text in cells.items()},
            }
        )
    return text.getvalue().encode("utf-8", "replace")


def _cell(text: str) -> str:
    return ("'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text)[:_CELL]
