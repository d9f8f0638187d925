"""The recorded answers are what the numbers of the questions give."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

import solvers.language
import solvers.learning
import solvers.meaning  # noqa: F401
from solvers import QUESTIONS, SOLVERS

# What cannot be computed is a matter of definition or of reading.
KNOWLEDGE = {
    "cfg-anbncn", "hmm-viterbi-time", "overfitting", "presupposition", "hyponymy", "roles-window", "dialogue-1",
    "dialogue-2", "dialogue-4", "pleonastic-it", "discourse-relation", "mcnemar", "morph-inflection", "cky-time",
    "lambda-every",
}  # fmt: skip


@pytest.mark.parametrize("name", SOLVERS)
def test_the_recorded_answer_is_what_the_numbers_of_the_question_give(name: str) -> None:
    q = QUESTIONS[name]
    found = SOLVERS[name](q)
    if q["type"] == "mc":
        assert found == q["answer"]
    elif q["unique"] and q["type"] == "sa":
        assert found in q["answer"]
    elif q["type"] == "sa":
        assert q["answer"][0].startswith(f"{found}.")
    else:
        for form in q["answer"]:
            assert agrees(form, float(found), rounded="decimals" in q["question"] or len(q["answer"]) > 1), form


def agrees(form: str, value: float, *, rounded: bool) -> bool:
    if "." in form and rounded:
        return f"{value:.{len(form.partition('.')[2])}f}" == form
    exact = math.sqrt(int(form[6:-1])) if form.startswith(r"\sqrt{") else float(Fraction(form))
    return math.isclose(exact, value, rel_tol=1e-9)


def test_every_question_is_solved_or_known_to_be_beyond_computing() -> None:
    definite = {name for name, q in QUESTIONS.items() if q["unique"]}
    assert {name for name, q in QUESTIONS.items() if q["type"] == "math"} <= set(SOLVERS)
    assert definite - set(SOLVERS) == KNOWLEDGE
    assert set(SOLVERS) <= set(QUESTIONS)
