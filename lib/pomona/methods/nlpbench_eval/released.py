"""Conversations as the released code has them, faults included: ``--profile released``, for comparison only.

What is reproduced here (the numbers are those of the list in the method's docstring): answers are glued onto user
messages and nobody ever speaks as the assistant (6); the system message goes by the first sub-question's type (6);
context and earlier turns are not shown to the thought call; votes in tree of thought compare a word list with a text,
so every vote is 0, everything survives and the first thought wins (2, 3): seven calls, in the order think, vote, three
times, then solve. Demonstrations and instruction are repeated on every turn. Two faults need asking for by
``--compat``: the vote's temperature of 50 that sticks (1), and the thought's limit of 128 tokens that sticks (4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pomona.methods.nlpbench_eval.choices import vote_texts
from pomona.methods.nlpbench_eval.conversation import SCORED, Messages, Method, Response, Steps, state_of
from pomona.methods.nlpbench_eval.questions import Question
from pomona.models.endpoint import Answer, Chain, Request

THOUGHT_TOKENS = 128
TREE_STEPS = 3
_VOTE_TEMPERATURE, _VALUE_TEMPERATURE = 50.0, 10.0


@dataclass
class _Sticky:
    """Settings of the released client, which keep what any call sets them to."""

    temperature: float
    max_tokens: int


def converse_as_released(turns: Sequence[Question], method: Method) -> Chain[list[Response]]:
    """All turns of one group, or the one question that stands alone, in order."""
    sticky = _Sticky(method.temperature, method.max_tokens)
    history: list[tuple[str, str]] = []
    if system := method.wording.system.get(turns[0].type):
        history.append(("system", system))
    if turns[0].context is not None:
        history.append(("user", turns[0].context))
    responses = []
    for question in turns:
        response = Response(question)
        responses.append(response)
        if method.strategy.tot and question.context is None:
            yield from _tree(response, method, sticky)
            continue
        thought = None
        if method.strategy.cot and not method.strategy.few_shot and question.type == "sa":
            thought = yield from _thought(response, method, sticky)
        history.append(("user", method.wording.ask(question, thought=thought)))
        request = _request(tuple(history), method, sticky)
        if method.strategy.sc and question.type == "mc":
            yield from _vote(response, request, method)
        else:
            (outcome,) = yield from response.ask("answer", [request])
            response.settle(outcome)
        role, asked = history[-1]
        history[-1] = role, asked + (response.text or "")
    return responses


def _request(messages: Messages, method: Method, sticky: _Sticky) -> Request:
    return replace(method.request(messages), temperature=sticky.temperature, max_tokens=sticky.max_tokens)


def _thought(response: Response, method: Method, sticky: _Sticky) -> Steps[str]:
    """The thought of a short answer; where the call fails, an empty one."""
    question = response.question
    system = [("system", text)] if (text := method.wording.system.get(question.type)) else []
    messages = (*system, ("user", method.wording.ask_thought(question)))
    request = replace(_request(messages, method, sticky), max_tokens=THOUGHT_TOKENS)
    if "thought-limit" in method.quirks:
        sticky.max_tokens = THOUGHT_TOKENS
    (outcome,) = yield from response.ask("thought", [request])
    thought = outcome.text if isinstance(outcome, Answer) else ""
    response.thoughts.append(thought)
    return thought


def _vote(response: Response, request: Request, method: Method) -> Steps[None]:
    """Self-consistency on the texts, blanks and quotes aside; ties go to the first seen."""
    outcomes = yield from response.ask("answer", [replace(request, sample=i) for i in range(method.samples)])
    usable = [o for o in outcomes if isinstance(o, Answer) and state_of(o) in SCORED]
    response.samples = [o.text if isinstance(o, Answer) and state_of(o) in SCORED else None for o in outcomes]
    response.settle(usable[0] if usable else outcomes[0])
    if usable:
        winner = vote_texts([o.text for o in usable])
        response.votes = {"share": winner.share, "tied": winner.tied}
        response.text = winner.choice


def _tree(response: Response, method: Method, sticky: _Sticky) -> Steps[None]:
    """Three thoughts from the same start, three votes that come to nothing, one solution from the first thought."""
    task = method.wording.ask(response.question)
    thoughts: list[str] = []
    for number in range(TREE_STEPS):  # told apart, or one answer would serve for all three
        thinking = replace(_request(_solution(task, [task]), method, sticky), sample=number)
        (outcome,) = yield from response.ask("thought", [thinking])
        thought = outcome.text if isinstance(outcome, Answer) else ""
        thoughts.append(thought)
        if "tot-temperature" in method.quirks:
            sticky.temperature = _VALUE_TEMPERATURE if method.value else _VOTE_TEMPERATURE
        name = "value" if method.value else "vote"
        voting = replace(_request(_ballot(task, thought, method.value), method, sticky), sample=number)
        yield from response.ask(name, [voting])
    response.thoughts += thoughts
    (outcome,) = yield from response.ask("answer", [_request(_solution(task, [task, thoughts[0]]), method, sticky)])
    response.settle(outcome)


def _solution(task: str, state: Sequence[str]) -> Messages:
    """The released code asks for thoughts and for the solution in the same words."""
    reasoning = "\n".join(state)
    text = f"Reasoning so far:\n{reasoning}\n\nGive the best solution of this task, directly:\n{task}"
    return (("user", text),)


def _ballot(task: str, thought: str, value: bool) -> Messages:
    if value:
        return (("user", f"Value this solution of the task with a number from 0 to 1.\n{task}\n\n{thought}"),)
    shown = " ".join(thought)  # joined character by character, as released
    return (("user", f"Vote for the best state of reasoning with a number from 1 to 10.\n{shown}\n\n{task}"),)
