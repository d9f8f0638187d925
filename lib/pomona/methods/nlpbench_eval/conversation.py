"""A conversation with a model and what comes of it: the words that strategies are written in.

A strategy is a generator (`Steps`): it yields requests that may be asked together and is sent what came of each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pomona.errors import UsageError
from pomona.methods.nlpbench_eval.prompts import CUE, Wording, in_context
from pomona.methods.nlpbench_eval.questions import Question, QuestionType
from pomona.models.endpoint import Answer, Chain, Outcome, Request, Unasked

T = TypeVar("T")
Messages = tuple[tuple[str, str], ...]
Steps = Generator[Sequence[Request], Sequence[Outcome], T]

_CUES = re.compile(re.escape(CUE), re.IGNORECASE)
_PARTS = ("zs", "fs", "cot", "sys", "sc", "tot")
SCORED = ("ok", "truncated", "refused")
"""States whose text is an answer."""

_STATES = {
    "empty answer": "empty",
    "malformed body": "bad_response",
    "no choices": "bad_response",
    "error in body": "bad_response",
    "timeout": "timeout",
    "context overflow": "context_overflow",
    "connection": "exhausted",
    "rate limited": "exhausted",
    "not valid Unicode": "http_4xx",
    "chat template refused": "http_4xx",
}
_FINISHED = {"length": "truncated", "refusal": "refused", "content_filter": "filtered"}


@dataclass(frozen=True, slots=True)
class Strategy:
    """A combination such as ``fs+cot+sys``.

    Attributes:
        few_shot: demonstrations are shown.
        cot: chain of thought.
        system: a system message by question type.
        sc: self-consistency, on multiple choice.
        tot: tree of thought.
    """

    few_shot: bool = False
    cot: bool = False
    system: bool = False
    sc: bool = False
    tot: bool = False

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Read ``zs``, ``fs``, ``cot``, ``sys``, ``sc``, ``tot`` joined by ``+`` (UsageError if they do not fit)."""
        parts = [part.strip() for part in text.lower().split("+")]
        if unknown := [part for part in parts if part not in _PARTS]:
            raise UsageError(f"--strategy {text}: {unknown[0]!r} is none of {', '.join(_PARTS)}")
        if len(set(parts)) != len(parts) or {"zs", "fs"} <= set(parts):
            raise UsageError(f"--strategy {text}: a part is there twice, or zs and fs together")
        if "tot" in parts and {"sc", "cot"} & set(parts):
            raise UsageError(f"--strategy {text}: tot reasons and votes by itself, without cot or sc")
        return cls("fs" in parts, "cot" in parts, "sys" in parts, "sc" in parts, "tot" in parts)

    def __str__(self) -> str:
        chosen = {"cot": self.cot, "tot": self.tot, "sc": self.sc, "sys": self.system}
        return "+".join(["fs" if self.few_shot else "zs", *(name for name, on in chosen.items() if on)])


@dataclass(frozen=True)
class Method:
    """Everything that decides what is asked.

    Attributes:
        history: what later turns of a group see of earlier ones: own answers, gold answers, or none.
        samples: draws of self-consistency.
        depth, branch, votes, beam: of the tree; thoughts per path, thoughts per state, votes per level, states kept.
        value: states are valued one by one, not voted on.
        temperature: of answers; `inner_temperature` of thoughts and votes.
        max_tokens: of answers; `thought_tokens` of thoughts.
        seed: of sampling, sent where the temperature is above 0.
        solutions: chain of thought on mathematics pastes the question's own worked solution (paper section 3.2).
        released: conversations as the released code has them: see `released`.
        quirks: faults of the released code that are off unless asked for: ``tot-temperature``, ``thought-limit``.
    """

    strategy: Strategy
    wording: Wording
    history: str = "own"
    samples: int = 3
    depth: int = 2
    branch: int = 3
    votes: int = 3
    beam: int = 2
    value: bool = False
    temperature: float = 0.0
    inner_temperature: float = 0.0
    max_tokens: int = 945
    thought_tokens: int = 512
    seed: int = 0
    solutions: bool = False
    released: bool = False
    quirks: frozenset[str] = frozenset()

    def request(self, messages: Messages, *, inner: bool = False) -> Request:
        """A request for `messages`; `inner` for thoughts and votes."""
        temperature = self.inner_temperature if inner else self.temperature
        limit = self.thought_tokens if inner else self.max_tokens
        return Request(messages, limit, temperature, seed=self.seed if temperature > 0 else None)


@dataclass(frozen=True, slots=True)
class Step:
    """One request of a conversation and what came of it; `name` is thought, vote, value or answer."""

    name: str
    request: Request
    outcome: Outcome


def drive(chain: Chain[T], answer: Callable[[Sequence[Request]], Sequence[Outcome]]) -> T:
    """Run a conversation to its end, `answer` giving what comes of each step's requests."""
    try:
        requests = next(chain)
        while True:
            requests = chain.send(answer(requests))
    except StopIteration as end:
        result: T = end.value
        return result


@dataclass(slots=True)
class Response:
    """What came of one question.

    Attributes:
        state: see `state_of`; of the call that was to give the answer.
        text: the whole final reply; None where there is none.
        cued: the reply was to end with the cue and the answer (chain of thought).
        pasted: the thought that was pasted into the question before it was answered.
        samples: the replies that were voted on, None for those that failed.
        tree: how the tree of thought got there.
        steps: every request, in the order they were made.
        usage: calls and tokens of `steps`, once those have been set down elsewhere.
    """

    question: Question
    state: str = "cancelled"
    text: str | None = None
    cued: bool = False
    pasted: str | None = None
    finish_reason: str | None = None
    thoughts: list[str] = field(default_factory=list)
    samples: list[str | None] | None = None
    votes: dict[str, Any] | None = None
    tree: dict[str, Any] | None = None
    steps: list[Step] = field(default_factory=list)
    usage: Mapping[str, int] = field(default_factory=dict)

    @property
    def in_form(self) -> bool:
        """Whether the reply has the cue that was asked for, if one was."""
        return not self.cued or _CUES.search(self.text or "") is not None

    @property
    def final(self) -> str:
        """What the reply gives as its answer, without the reasoning before it; empty where there is no reply."""
        return final_part(self.text or "", self.cued)

    def ask(self, name: str, requests: Iterable[Request]) -> Steps[list[Outcome]]:
        """Ask `requests` together and remember them."""
        wanted = list(requests)
        outcomes = yield wanted
        self.steps += [Step(name, r, o) for r, o in zip(wanted, outcomes, strict=True)]
        return list(outcomes)

    def settle(self, outcome: Outcome) -> None:
        """Take `outcome` for the answer."""
        self.state = state_of(outcome)
        self.finish_reason = getattr(outcome, "finish_reason", None)
        self.text = outcome.text if isinstance(outcome, Answer) and self.state in SCORED else None


def state_of(outcome: Outcome) -> str:
    """The one state a call ends in (spec section 8).

    ok, truncated, refused: there is an answer. empty, filtered, bad_response, timeout, context_overflow, http_4xx (the
    request itself was refused), exhausted (retries used up), budget: there is none, which is not a wrong one.
    """
    if isinstance(outcome, Answer):
        return _FINISHED.get(outcome.finish_reason or "", "ok")
    if isinstance(outcome, Unasked):
        return "budget"
    if outcome.reason in _STATES:
        return _STATES[outcome.reason]
    return "http_4xx" if outcome.reason.startswith("http 4") else "exhausted"


@dataclass(frozen=True, slots=True)
class Turn:
    """An earlier question of the same conversation, the thought that was pasted into it, and the reply."""

    question: Question
    thought: str | None
    reply: str


@dataclass(frozen=True)
class Before:
    """What a question is asked after: system message, context, earlier turns that have an answer."""

    turns: Sequence[Question]
    past: Sequence[Turn]
    method: Method

    def then(self, question: Question, text: str | None = None, *, thought: str | None = None) -> Messages:
        """The conversation up to and with `text`, by default the message that asks `question`."""
        wording, messages = self.method.wording, list(self._system())
        seen: set[QuestionType] = set()
        for turn in self.past:
            first = turn.question.type not in seen
            self._say(messages, turn.question, wording.ask(turn.question, thought=turn.thought, first=first))
            messages.append(("assistant", turn.reply))
            seen.add(turn.question.type)
        if text is None:
            text = wording.ask(question, thought=thought, first=question.type not in seen)
        self._say(messages, question, text)
        return tuple(messages)

    def _say(self, messages: list[tuple[str, str]], question: Question, text: str) -> None:
        begun = any(role == "user" for role, _ in messages)
        messages.append(("user", text if begun or question.context is None else in_context(question.context, text)))

    def _system(self) -> Iterable[tuple[str, str]]:
        """One system message for the types that occur, each said once."""
        texts = dict.fromkeys(self.method.wording.system.get(q.type, "") for q in self.turns)
        if text := "\n\n".join(filter(None, texts)):
            yield "system", text


def final_part(text: str, cued: bool) -> str:
    """What a reply gives as its answer: with a cue what follows the last one, else all of it."""
    cues = list(_CUES.finditer(text)) if cued else []
    return text[cues[-1].end() :].strip() if cues else text


def gold_reply(question: Question, *, cued: bool) -> str:
    """The gold answer in the form the model was asked for."""
    text = ",".join(map(str, question.answer)) if question.type == "mc" else question.gold_text
    return f"{CUE} {text}" if cued else text


def usage_of(steps: Iterable[Step]) -> Mapping[str, int]:
    """Calls and tokens of `steps`, counted from the answers they got."""
    answers = [s.outcome for s in steps if isinstance(s.outcome, Answer)]
    return {
        "calls": sum(a.calls for a in answers),
        "prompt_tokens": sum(a.prompt_tokens for a in answers),
        "completion_tokens": sum(a.completion_tokens for a in answers),
    }
