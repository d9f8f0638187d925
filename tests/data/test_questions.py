"""The exam questions are well formed, balanced and counted; each worked solution holds line by line."""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from collections import Counter, defaultdict
from typing import Any

import pytest

from conftest import ROOT

FOLDER = ROOT / "data/nlpbench"
KEYS = "id group turn context type question options answer category unique solution".split()
CATEGORIES = {"lmsp", "ai", "sl", "irtm", "pdda", "ot"}
LINES = (FOLDER / "questions.jsonl").read_text(encoding="utf-8").splitlines()
QUESTIONS: list[dict[str, Any]] = [json.loads(line) for line in LINES]
CHOICE = [q for q in QUESTIONS if q["type"] == "mc"]
MATHS = [q for q in QUESTIONS if q["type"] == "math"]

every_question = pytest.mark.parametrize("q", QUESTIONS, ids=lambda q: q["id"])
every_choice = pytest.mark.parametrize("q", CHOICE, ids=lambda q: q["id"])
every_maths = pytest.mark.parametrize("q", MATHS, ids=lambda q: q["id"])


def texts(q: dict[str, Any]) -> list[str]:
    answers = [] if q["type"] == "mc" else q["answer"]
    return [t for t in (q["question"], q["context"], q["solution"], *(q["options"] or []), *answers) if t is not None]


# --- one question ---------------------------------------------------------------------------------------------------


@every_question
def test_a_question_has_every_field_in_order(q: dict[str, Any]) -> None:
    assert list(q) == KEYS
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", q["id"])
    assert q["type"] in ("mc", "sa", "math") and q["category"] in CATEGORIES and type(q["unique"]) is bool
    assert type(q["turn"]) is int and (q["group"] is None) == (q["context"] is None)


@every_question
def test_its_texts_are_plain(q: dict[str, Any]) -> None:
    for text in texts(q):
        assert text.isascii() and text == text.strip() and text
        assert text.count("{") == text.count("}") and text.count("$") % 2 == 0
        assert all(ch.isprintable() or ch == "\n" for ch in text)


@every_choice
def test_the_right_options_exist_and_more_than_one_is_announced(q: dict[str, Any]) -> None:
    options, answer = q["options"], q["answer"]
    assert all(type(i) is int and 0 <= i < len(options) for i in answer)
    assert answer and answer == sorted(set(answer)) and len(answer) < len(options)
    assert len(set(options)) == len(options)
    assert not any(re.match(r"\(?[A-Ea-e0-9][).:]", option) for option in options), "options bear no letters"
    assert q["unique"]
    assert (len(answer) > 1) == ("Select all that apply" in q["question"])
    truth = options == ["True", "False"]
    assert truth == q["question"].startswith("True or false: ")
    assert truth or 3 <= len(options) <= 5


@pytest.mark.parametrize("q", [q for q in QUESTIONS if q["type"] != "mc"], ids=lambda q: q["id"])
def test_a_text_answer_is_a_list_of_different_forms(q: dict[str, Any]) -> None:
    assert q["options"] is None and q["answer"] and len(set(q["answer"])) == len(q["answer"])
    if q["type"] == "math":
        assert q["unique"] and q["solution"]
    elif q["unique"]:
        assert len(q["answer"]) > 1, "a definite answer has a short form"
    else:
        assert len(q["answer"]) == 1 and len(q["answer"][0].split()) <= 150  # the limit of the short-answer prompt


# --- all of them ----------------------------------------------------------------------------------------------------


def test_ids_and_questions_are_not_repeated() -> None:
    assert len({q["id"] for q in QUESTIONS}) == len(QUESTIONS)
    asked = Counter(" ".join(q["question"].lower().split()) for q in QUESTIONS)
    assert asked.most_common(1)[0][1] == 1


def test_groups_stand_together_with_one_context_and_contiguous_turns() -> None:
    groups: dict[str, list[int]] = {}
    for place, q in enumerate(QUESTIONS):
        if q["group"] is None:
            assert q["turn"] == 0
        else:
            groups.setdefault(q["group"], []).append(place)
    for name, places in groups.items():
        members = QUESTIONS[places[0] : places[-1] + 1]
        assert [q["group"] for q in members] == [name] * len(members), "side by side"
        assert [q["turn"] for q in members] == list(range(len(members))) and 2 <= len(members) <= 5
        assert [q["id"] for q in members] == [f"{name}-{turn + 1}" for turn in range(len(members))]
        assert len({q["context"] for q in members}) == 1
        assert len({q["type"] for q in members}) > 1
    assert len({QUESTIONS[places[0]]["context"] for places in groups.values()}) == len(groups)


def test_right_answers_are_spread_over_the_positions() -> None:
    # Against the hypothesis that every position of a question is as likely to be right; the 0.999 quantile of
    # chi-square with 4 degrees of freedom bounds the sum.
    seen: Counter[int] = Counter()
    expected: defaultdict[int, float] = defaultdict(float)
    for q in CHOICE:
        for place in range(len(q["options"])):
            expected[place] += len(q["answer"]) / len(q["options"])
        seen.update(q["answer"])
    assert sum((seen[i] - expected[i]) ** 2 / expected[i] for i in expected) < 18.47
    lone = Counter(q["answer"][0] for q in CHOICE if len(q["answer"]) == 1)
    assert max(lone.values()) <= 0.4 * sum(lone.values()), "no constant guess does well"
    truth = Counter(q["answer"][0] for q in CHOICE if len(q["options"]) == 2)
    assert abs(truth[0] - truth[1]) <= 1


def test_the_readme_gives_the_counts() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = {
        row[0]: [int(cell) for cell in row[1:]]
        for row in re.findall(r"^\| (\S+) \| (\d+) \| (\d+) \| (\d+) \|", readme, re.M)
    }
    for field in ("category", "type"):
        for value in {q[field] for q in QUESTIONS}:
            placed = [q["context"] is not None for q in QUESTIONS if q[field] == value]
            assert rows.pop(f"`{value}`") == [sum(placed), len(placed) - sum(placed), len(placed)], value
    placed = [q["context"] is not None for q in QUESTIONS]
    assert rows.pop("all") == [sum(placed), len(placed) - sum(placed), len(placed)]
    assert not rows
    groups = {q["group"] for q in QUESTIONS} - {None}
    assert f"{len(groups)} groups" in readme


def test_the_paper_s_proportions_are_roughly_kept() -> None:
    assert len(QUESTIONS) >= 72
    assert 0.4 < sum(q["context"] is not None for q in QUESTIONS) / len(QUESTIONS) < 0.5
    assert {q["category"] for q in QUESTIONS} == CATEGORIES


# --- worked solutions -----------------------------------------------------------------------------------------------

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_FUNCTIONS = {"sqrt": math.sqrt, "exp": math.exp, "log2": math.log2}


def figure(text: str) -> float:
    """The value of plain arithmetic.

    Raises:
        SyntaxError: it is not an expression.
        KeyError: it holds anything but figures, operators and the functions above.
    """

    def value(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.BinOp():
                return _OPERATORS[type(node.op)](value(node.left), value(node.right))  # type: ignore[index]
            case ast.UnaryOp(op=ast.USub()):
                return -value(node.operand)
            case ast.Call(func=ast.Name(id=name), args=[argument]):
                return _FUNCTIONS[name](value(argument))
        raise KeyError(text)

    return value(ast.parse(text.replace("^", "**"), mode="eval").body)


def holds(equation: str) -> bool:
    """Whether neighbours in a chain of figures agree: exactly after `=`, to the digits shown after `~=`."""
    first, *rest = re.split(r" (~?=) ", equation)
    left = figure(first)
    for sign, text in zip(rest[::2], rest[1::2], strict=True):
        right = figure(text)
        rounding = 0.5 * 10.0 ** -len(text.partition(".")[2]) if sign == "~=" else 0.0
        if not math.isclose(left, right, rel_tol=1e-12, abs_tol=rounding):
            return False
        left = right
    return bool(rest)


@every_maths
def test_every_equation_of_a_solution_holds_and_the_last_gives_the_answer(q: dict[str, Any]) -> None:
    *steps, last = q["solution"].splitlines()
    assert last == f"Answer: {q['answer'][0]}"
    equations = [step.rpartition(": ")[2] for step in steps if ": " in step]
    for equation in equations:
        assert holds(equation), equation
    assert q["answer"][0] in re.split(r" ~?= ", equations[-1])[1:]


def test_a_wrong_step_is_seen() -> None:
    assert holds("2/3 * 1/2 = 1/3 ~= 0.333") and holds("sqrt(3) ~= 1.732") and holds("2^3 = 8")
    assert not holds("2/3 * 1/2 = 0.333") and not holds("sqrt(3) ~= 1.733") and not holds("2^3")
    with pytest.raises(KeyError):
        figure("open('f')")
