"""Asking an OpenAI-compatible endpoint many questions: in order, within limits, and never paying twice.

`answers` is for questions that stand alone and may come from a slow pipe: the caller's thread iterates over answers, a
feeder pulls the requests and stays a bounded window ahead. `conversations` is for questions that depend on answers: the
caller's thread also runs the conversations, as many at a time as there may be requests in flight. Either way an event
loop in a thread of its own (`asking`) sends the requests, memory does not grow with the input, and every answer is in
the journal before anybody sees it.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from pomona.errors import EndpointError
from pomona.io.journal import Journal, NoJournal
from pomona.models.asking import Asker, Step
from pomona.models.budget import Budget, CongestionWindow, Pace, Usage, estimate_prompt_tokens, prompt_bound
from pomona.models.dialect import Dialect
from pomona.models.endpoint import (
    Answer,
    Chain,
    Endpoint,
    Failure,
    Outcome,
    Request,
    Unasked,
    read_key,
    redact,
    request_key,
)
from pomona.models.reply import Trouble
from pomona.runtime.progress import Progress

_WINDOW = 256  # requests pulled ahead of the caller, at least
_STRIDE = 32  # taken before the feeder is woken for more: a thread switch each would cost more than the rest
_RESUME_HINT = "finished answers are kept: the same command with --resume asks only for the rest"

__all__ = [
    "Answer",
    "Budget",
    "ChatClient",
    "Endpoint",
    "Failure",
    "Outcome",
    "Request",
    "Unasked",
    "estimate_prompt_tokens",
    "request_key",
]

T = TypeVar("T")
R = TypeVar("R")


class ChatClient:
    """Asks one endpoint; see the module.

    `downgrades` says what the endpoint turned out not to support, by parameter, and what is done instead.

    Raises:
        UsageError: the address is not one, or the key is unfit or missing; only OpenAI's own service needs one.
    """

    def __init__(self, endpoint: Endpoint, journal: Journal | NoJournal, budget: Budget, progress: Progress) -> None:
        self.endpoint = endpoint
        self.journal = journal
        self.budget = budget
        self.progress = progress
        self.key = read_key(endpoint)
        self.answered = 0
        self.reached = False
        self.dialect = Dialect(endpoint, progress.warn)
        self.downgrades = self.dialect.downgrades
        self.window = CongestionWindow(endpoint.concurrency)
        self.requests_per_minute = Pace(endpoint.rpm)
        self.tokens_per_minute = Pace(endpoint.tpm)
        self._fruitless = 0
        self._excess = Usage()

    def answers(self, requests: Iterable[tuple[T, Request]]) -> Iterator[tuple[T, Outcome]]:
        """Each item with what came of its request, in input order.

        `requests` is pulled in a thread of its own, a bounded window ahead; what it raises is raised here, in place.
        Closing the iterator, or an exception while it waits, cancels what is in flight.

        Raises:
            EndpointError: the key or the model was refused, or the endpoint is down.
        """
        asker = Asker(self)
        feeder = _Feeder(requests, asker, max(_WINDOW, 4 * self.endpoint.concurrency))
        try:
            asker.start()
            feeder.start()
            for taken in itertools.count(1):
                slot = feeder.order.get()
                if slot is None:
                    return
                yield slot.item, slot.outcome.result()
                if taken % _STRIDE == 0:
                    feeder.window.release(_STRIDE)
        finally:
            feeder.stop()
            asker.stop()

    def conversations(self, chains: Iterable[tuple[T, Chain[R]]]) -> Iterator[tuple[T, R]]:
        """Each item with the result of its conversation, as they finish.

        Conversations begin in the given order, at most `concurrency` are under way, and they run in the caller's
        thread: what `chains` or one of them raises is raised here. Requests of one step that are alike but for `sample`
        cost one call where the server gives several choices. Closing the iterator, or an exception, cancels what is in
        flight and closes the conversations under way.

        Raises:
            EndpointError: as for `answers`.
        """
        asker = Asker(self)
        heard: queue.SimpleQueue[tuple[T, Chain[R], list[Outcome] | BaseException]] = queue.SimpleQueue()
        live: set[Chain[R]] = set()
        ended: deque[tuple[T, R]] = deque()

        def go_on(item: T, chain: Chain[R], outcomes: Sequence[Outcome] | None) -> None:
            live.add(chain)
            try:
                requests = next(chain) if outcomes is None else chain.send(outcomes)
            except StopIteration as end:
                live.discard(chain)
                ended.append((item, end.value))
            else:
                asker.ask(Step(requests, lambda result: heard.put((item, chain, result))))

        try:
            asker.start()
            source, more = iter(chains), True
            while live or ended or more:
                while more and len(live) < self.endpoint.concurrency > len(ended):
                    begun = next(source, None)
                    if more := begun is not None:
                        go_on(*begun, None)
                while ended:
                    yield ended.popleft()
                if live:
                    item, chain, result = heard.get()
                    if isinstance(result, BaseException):
                        raise result
                    go_on(item, chain, result)
        finally:
            asker.stop()
            for chain in live:
                chain.close()

    def worst_case(self, request: Request, samples: int) -> Usage:
        """Tokens that a call will not exceed, judging by the bound and by what the server counted so far."""
        return _bound(request, samples).plus(self._excess)

    def learn(self, request: Request, samples: int, used: Usage) -> None:
        """Widen the bound when a server counts more than it allows for (a long template, tokens beyond the limit)."""
        excess = used.minus(_bound(request, samples))
        self._excess = Usage(max(self._excess.prompt, excess.prompt), max(self._excess.completion, excess.completion))

    def succeed(self) -> None:
        """Note a usable answer."""
        self.answered += 1
        self._fruitless = 0

    def fail(self, trouble: Trouble) -> None:
        """Note a request given up, and stop the run when there is no hope for the others.

        That is: the address never took a connection, the server refused us as such, or so many requests in a row came
        to nothing that the endpoint must be down (five times as many if it has worked before). Trouble with a single
        request counts only while nothing ever worked.
        """
        address, said = redact(self.endpoint.address), f"{trouble.reason}: {self.redact(trouble.detail)}".rstrip(": ")
        if trouble.fatal:
            hint = f"check --model {self.endpoint.model}, and the key in ${self.endpoint.api_key_env}"
            raise EndpointError(f"{address} refused: {said}", hint=f"{hint}; {_RESUME_HINT}")
        if trouble.wait > self.endpoint.max_wait:
            until = (datetime.now(UTC) + timedelta(seconds=trouble.wait)).strftime("%Y-%m-%d %H:%M:%S UTC")
            raise EndpointError(
                f"{address} asks to wait {timedelta(seconds=round(trouble.wait))}, until {until}: {said}",
                hint=f"that is beyond --max-wait {self.endpoint.max_wait:g}; run it again then; {_RESUME_HINT}",
            )
        if trouble.reason == "http 404" and not self.answered and "/v1" not in urlsplit(self.endpoint.address).path:
            raise EndpointError(f"{address} knows no chat: {said}", hint=f"add /v1: --base-url {address}/v1")
        check = f"check --base-url and that the server runs; {_RESUME_HINT}"
        if trouble.unreachable and not self.reached:
            raise EndpointError(f"{address} cannot be reached: {said}", hint=check)
        if not trouble.down and (self.answered or len(self.journal)):
            return
        self._fruitless += 1
        if self._fruitless >= max(5, min(self.endpoint.concurrency, 20)) * (5 if self.answered else 1):
            raise EndpointError(
                f"{address}: {self._fruitless} requests in a row came to nothing, the last with {said}",
                hint=check,
            )

    def redact(self, text: str) -> str:
        """`text` without the key and anything like one, on one line of 300 characters at most."""
        text = " ".join(redact(text, self.key).split())
        return text if len(text) <= 300 else text[:299] + "…"


def _bound(request: Request, samples: int) -> Usage:
    return Usage(prompt_bound(request.messages), request.max_tokens * samples)


@dataclass(slots=True)
class _Slot(Generic[T]):
    """A place in the output order."""

    item: T
    outcome: Future[Outcome] = field(default_factory=Future)

    def fill(self, result: list[Outcome] | BaseException) -> None:
        if isinstance(result, BaseException):
            self.outcome.set_exception(result)
        else:
            self.outcome.set_result(result[0])


class _Feeder(Generic[T]):
    """Pulls requests in a thread of its own and has them asked, each of them a step; `order` ends in None."""

    def __init__(self, requests: Iterable[tuple[T, Request]], asker: Asker, window: int) -> None:
        self.order: queue.SimpleQueue[_Slot[T] | None] = queue.SimpleQueue()
        self.window = threading.Semaphore(window)
        self._requests = requests
        self._asker = asker
        self._stopped = False

    def start(self) -> None:
        threading.Thread(target=self._feed, name="chat-feeder", daemon=True).start()

    def stop(self) -> None:
        """End it; one that is stuck in its input is left behind, it holds nothing."""
        self._stopped = True
        self.window.release()

    def _feed(self) -> None:
        try:
            for item, request in self._requests:
                slot = _Slot(item)
                self.order.put(slot)
                self._asker.ask(Step((request,), slot.fill))
                self.window.acquire()
                if self._stopped:
                    return
        except BaseException as error:
            broken: _Slot[Any] = _Slot(None)  # raises the error in the caller's thread when it gets to this place
            broken.outcome.set_exception(error)
            self.order.put(broken)
        finally:
            self.order.put(None)
