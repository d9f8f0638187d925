"""Models without a model: an oracle that knows every answer, and a stand-in that lets a dry run count calls."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from pomona.methods.nlpbench_eval.conversation import drive, gold_reply
from pomona.methods.nlpbench_eval.prompts import QUESTION, REASONING, asked
from pomona.methods.nlpbench_eval.questions import Question
from pomona.models.budget import estimate_prompt_tokens, estimate_text_tokens
from pomona.models.endpoint import Answer, Chain, Outcome, Request

T = TypeVar("T")
R = TypeVar("R")
_BALLOTS = {"The best choice is N": "The best choice is 1", "number from 0 to 1": "1", "number from 1 to 10": "10"}


class Oracle:
    """Answers each question with its gold answer, in the form asked for; token counts are estimates.

    Args:
        questions: those it may be asked.
    """

    identity = "mock:oracle"

    def __init__(self, questions: Sequence[Question]) -> None:
        self._known: dict[str, list[Question]] = {}
        for question in questions:
            self._known.setdefault(question.question.split("\n", 1)[0], []).append(question)

    def conversations(self, chains: Iterable[tuple[T, Chain[R]]]) -> Iterator[tuple[T, R]]:
        """Each item with what its conversation returned."""
        for item, chain in chains:
            yield item, drive(chain, lambda requests: [self._answer(request) for request in requests])

    def _answer(self, request: Request) -> Outcome:
        text = request.messages[-1][1]
        reply = next((vote for words, vote in _BALLOTS.items() if words in text), None)
        if reply is None:
            reply = gold_reply(self._asked(text), cued=text.endswith(REASONING))
        tokens = estimate_prompt_tokens(request.messages), estimate_text_tokens(reply)
        return Answer(reply, *tokens, "stop", self.identity, cached=False, estimated=True)

    def _asked(self, text: str) -> Question:
        """The question that a message ends in."""
        for line in reversed(text.split("\n")):
            for question in self._known.get(line.removeprefix(QUESTION), ()):
                if asked(question) in text:
                    return question
        # Released texts may have the question within a line.
        everything = [question for questions in self._known.values() for question in questions]
        return max(everything, key=lambda question: text.rfind(asked(question)))


class Planner:
    """Takes part in conversations to count what they would cost; every reply is as long as it may be.

    Attributes:
        requests: samples asked for.
        calls: calls they take where the model gives several samples a call; else there are as many as requests.
        prompt_tokens, completion_tokens: estimates; of completions the most that can come back.
    """

    def __init__(self) -> None:
        self.requests = self.calls = self.prompt_tokens = self.completion_tokens = 0
        self._numbers = itertools.count(1)

    def answer(self, requests: Sequence[Request]) -> list[Outcome]:
        """Stand-in answers, no two alike, so that a search finds as many candidates as it can."""
        self.requests += len(requests)
        self.calls += len({(r.messages, r.max_tokens, r.temperature) for r in requests})
        outcomes: list[Outcome] = []
        for request in requests:
            prompt = estimate_prompt_tokens(request.messages)
            self.prompt_tokens += prompt
            self.completion_tokens += request.max_tokens
            outcomes.append(Answer(f"{next(self._numbers)}", prompt, request.max_tokens, "stop", "plan", cached=False))
        return outcomes
