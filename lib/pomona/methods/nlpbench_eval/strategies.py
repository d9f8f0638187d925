"""The strategies of the paper (section 3.2), whoever answers.

`converse` yields requests, is sent what came of them, and returns a `Response` for each question of its group. An
endpoint, a local model, an oracle and the planner of a dry run all drive the same generators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pomona.methods.nlpbench_eval.choices import parse_lenient, vote_sets
from pomona.methods.nlpbench_eval.conversation import (
    SCORED,
    Before,
    Method,
    Response,
    Steps,
    Strategy,
    Turn,
    final_part,
    gold_reply,
    state_of,
)
from pomona.methods.nlpbench_eval.questions import Question, QuestionType
from pomona.methods.nlpbench_eval.released import converse_as_released
from pomona.methods.nlpbench_eval.tree import search
from pomona.models.endpoint import Answer, Chain, Request


def converse(turns: Sequence[Question], method: Method) -> Chain[list[Response]]:
    """All turns of one group, or the one question that stands alone, in order."""
    if method.released:
        return (yield from converse_as_released(turns, method))
    past: list[Turn] = []
    responses = []
    for question in turns:
        response = Response(question)
        yield from solve(response, Before(turns, past, method), method)
        responses.append(response)
        if method.history == "gold":
            past.append(Turn(question, None, gold_reply(question, cued=method.wording.instructed)))
        elif method.history == "own" and response.text is not None:
            past.append(Turn(question, response.pasted, response.text))
    return responses


def solve(response: Response, before: Before, method: Method) -> Steps[None]:
    """One question by the strategy of `method`."""
    question, strategy = response.question, method.strategy
    if strategy.tot:
        yield from search(response, before, method)
        return
    if strategy.cot and method.solutions and question.type == "math" and question.solution:
        response.pasted = question.solution
    elif asks_twice(question.type, strategy):
        messages = before.then(question, method.wording.ask_thought(question))
        (outcome,) = yield from response.ask("thought", [method.request(messages, inner=True)])
        if not isinstance(outcome, Answer) or state_of(outcome) == "filtered":
            response.settle(outcome)
            return
        response.pasted = outcome.text
        response.thoughts.append(outcome.text)
    response.cued = method.wording.instructed and response.pasted is None
    request = method.request(before.then(question, thought=response.pasted))
    if strategy.sc and question.type == "mc":
        yield from sample(response, request, method)
    else:
        (outcome,) = yield from response.ask("answer", [request])
        response.settle(outcome)


def asks_twice(kind: QuestionType, strategy: Strategy) -> bool:
    """Whether chain of thought takes two calls: for short answers without demonstrations, as in the released code."""
    return strategy.cot and not strategy.few_shot and kind == "sa"


def sample(response: Response, request: Request, method: Method) -> Steps[None]:
    """Self-consistency: several draws, and the answer most of them give (paper section 3.2)."""
    outcomes = yield from response.ask("answer", [replace(request, sample=i) for i in range(method.samples)])
    usable = [o for o in outcomes if isinstance(o, Answer) and state_of(o) in SCORED]
    response.samples = [o.text if isinstance(o, Answer) and state_of(o) in SCORED else None for o in outcomes]
    if not usable:
        response.settle(outcomes[0])
        return
    parsed = [parse_lenient(final_part(o.text, response.cued), response.question.options) for o in usable]
    vote = vote_sets(parsed)
    chosen = next((o for o, choice in zip(usable, parsed, strict=True) if choice == vote.choice), usable[0])
    response.votes = {"share": vote.share, "tied": vote.tied}
    response.settle(chosen)
