"""Tree of thought: breadth-first search over partial lines of reasoning (Yao et al., arXiv 2305.10601, algorithm 1).

Level by level: each state kept grows `branch` thoughts, the candidates are voted on (or valued one by one), the best
`beam` go on. The answer is asked for once, with the best line of reasoning pasted in. By default depth 2, branch 3,
3 votes, beam 2: sixteen samples a question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from pomona.methods.nlpbench_eval.conversation import Before, Method, Response, Steps
from pomona.methods.nlpbench_eval.prompts import INSTRUCTIONS, QUESTION, asked
from pomona.methods.nlpbench_eval.questions import Question
from pomona.models.endpoint import Answer, Outcome, Request

State = tuple[str, ...]
"""Thoughts, the first first."""

_BEST = re.compile(r"best choice is\D{0,20}(\d+)", re.IGNORECASE)
_ALONE = re.compile(r"\D*(\d+)\D*")
_VALUE = re.compile(r"(?<![\d.])(?:0(?:\.\d+)?|1(?:\.0+)?|\.\d+)(?![\d.]*\d)")


def search(response: Response, before: Before, method: Method) -> Steps[None]:
    """Search, then answer; a level whose every thought failed ends the question in the state of the first of them."""
    question = response.question
    states: list[State] = [()]
    dropped, levels = 0, []
    for _ in range(method.depth):
        requests = [
            replace(method.request(before.then(question, propose(question, state)), inner=True), sample=i)
            for state in states
            for i in range(method.branch)
        ]
        outcomes = yield from response.ask("thought", requests)
        grown = [(*states[i // method.branch], text) for i, o in enumerate(outcomes) if (text := _thought(o))]
        candidates = list(dict.fromkeys(grown))
        if not candidates:
            response.settle(outcomes[0])
            return
        scores, lost = yield from _evaluate(response, before, method, candidates)
        dropped += lost
        order = sorted(range(len(candidates)), key=lambda i: (-scores[i], i))
        states = [candidates[i] for i in order[: method.beam]]
        levels.append({"candidates": len(candidates), "scores": [round(score, 6) for score in scores]})
    response.thoughts += states[0]
    response.pasted = "\n".join(states[0])
    request = method.request(before.then(question, thought=response.pasted))
    (outcome,) = yield from response.ask("answer", [request])
    response.settle(outcome)
    response.tree = {"levels": levels, "unread_votes": dropped}


def _thought(outcome: Outcome) -> str:
    """The thought in a reply; empty where there is none."""
    return outcome.text.strip() if isinstance(outcome, Answer) and outcome.finish_reason != "content_filter" else ""


def _evaluate(
    response: Response, before: Before, method: Method, candidates: Sequence[State]
) -> Steps[tuple[list[float], int]]:
    """A score for each candidate, and how many votes could not be read."""
    question = response.question
    texts = [choose(question, candidates)] if not method.value else [rate(question, state) for state in candidates]
    bases = [method.request(before.then(question, text), inner=True) for text in texts]
    requests: list[Request] = [replace(base, sample=i) for base in bases for i in range(method.votes)]
    outcomes = yield from response.ask("value" if method.value else "vote", requests)
    replies = [o.text if isinstance(o, Answer) else "" for o in outcomes]
    if not method.value:
        votes = [read_vote(text, len(candidates)) for text in replies]
        return [float(votes.count(i)) for i in range(len(candidates))], votes.count(None)
    values = [read_value(text) for text in replies]
    rows = [values[i : i + method.votes] for i in range(0, len(values), method.votes)]
    known = [[v for v in row if v is not None] for row in rows]
    return [sum(row) / len(row) if row else 0.0 for row in known], values.count(None)


def read_vote(text: str, candidates: int) -> int | None:
    """The candidate, from 0, that a vote names; None where it names none or one that is not there."""
    named = _BEST.findall(text) or ([match[1]] if (match := _ALONE.fullmatch(text.strip())) else [])
    number = int(named[-1]) if named and len(named[-1]) < 9 else 0
    return number - 1 if 1 <= number <= candidates else None


def read_value(text: str) -> float | None:
    """The last number from 0 to 1 in a reply."""
    found = _VALUE.findall(text)
    return float(found[-1]) if found else None


def propose(question: Question, state: State) -> str:
    """The message that asks for the next thought."""
    return "\n".join(
        [
            *_task(question),
            *_reasoning(state, "So far:"),
            f"Write down thought {len(state) + 1} on the way to the answer: one short paragraph. Do not answer yet.",
        ]
    )


def choose(question: Question, candidates: Sequence[State]) -> str:
    """The message that puts all candidates to the vote."""
    lines = [*_task(question), "These lines of reasoning have been started:", ""]
    for number, state in enumerate(candidates, 1):
        lines += [f"Choice {number}:", *state, ""]
    lines.append(
        'Compare them in a few words. Then end with the line "The best choice is N", N being the number of the one '
        "that is most likely to lead to the right answer."
    )
    return "\n".join(lines)


def rate(question: Question, state: State) -> str:
    """The message that has one candidate valued."""
    return "\n".join(
        [
            *_task(question),
            *_reasoning(state, "This line of reasoning has been started:"),
            "How likely is it to lead to the right answer? Reply with one number from 0 to 1.",
        ]
    )


def _task(question: Question) -> list[str]:
    return [INSTRUCTIONS[question.type], "", f"{QUESTION}{asked(question)}", ""]


def _reasoning(state: State, header: str) -> list[str]:
    return [header, *state, ""] if state else []
