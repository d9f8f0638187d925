"""Asking an OpenAI-compatible endpoint many questions: in order, within limits, and never paying twice.

Three threads share the work. The caller's iterates over answers; a feeder pulls the requests, which may come from a
slow pipe; an event loop sends them. The feeder stays a bounded window ahead of the caller, so memory does not grow with
the input. Every answer is in the journal before anybody sees it. The retries here are the only ones: the SDK's are off.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import random
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, TypeVar

import openai

from pomona.errors import EndpointError
from pomona.io.journal import Journal, NoJournal
from pomona.models.budget import Budget, Pace, Usage, estimate_prompt_tokens, estimate_text_tokens, prompt_bound
from pomona.models.endpoint import (
    Answer,
    Endpoint,
    Failure,
    Outcome,
    Request,
    Unasked,
    read_key,
    redact,
    request_key,
)
from pomona.models.reply import Reply, Trouble, read_error, read_reply
from pomona.runtime.progress import Progress

BACKOFF_BASE = 0.5  # seconds; the n-th retry waits up to base · 2^(n-1), uniformly
BACKOFF_CAP = 60.0
_FIRST_TRIES = 3  # attempts at an address that never took a connection; more would only delay the message
_PROBE = 2.0  # seconds the first request goes alone: a wrong key or address costs one call, not `concurrency`
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


class ChatClient:
    """Asks one endpoint; see the module.

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
        session = _Session(self, requests)
        try:
            session.thread.start()
            for taken in itertools.count(1):
                slot = session.order.get()
                if slot is None:
                    return
                yield slot.item, slot.outcome.result()
                if taken % _STRIDE == 0:
                    session.window.release(_STRIDE)
        finally:
            session.stop()

    def worst_case(self, request: Request) -> Usage:
        """Tokens that `request` will not exceed, judging by the bound and by what the server counted so far."""
        return Usage(prompt_bound(request.messages), request.max_tokens).plus(self._excess)

    def learn(self, request: Request, used: Usage) -> None:
        """Widen the bound when a server counts more than it allows for (a long template, tokens beyond the limit)."""
        excess = used.minus(Usage(prompt_bound(request.messages), request.max_tokens))
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


@dataclass(slots=True)
class _Slot(Generic[T]):
    """A place in the output order."""

    item: T
    request: Request
    outcome: Future[Outcome] = field(default_factory=Future)


class _Session(Generic[T]):
    """One pass over requests: the feeder, the loop, and what is in flight."""

    def __init__(self, client: ChatClient, requests: Iterable[tuple[T, Request]]) -> None:
        self.client = client
        self.order: queue.SimpleQueue[_Slot[T] | None] = queue.SimpleQueue()
        self.window = threading.Semaphore(max(_WINDOW, 4 * client.endpoint.concurrency))
        self.thread = threading.Thread(target=self._run, name="chat", daemon=True)
        self._requests = requests
        self._stopped = threading.Event()
        self._started = threading.Event()
        self._main: asyncio.Task[Any] | None = None
        self._asking: dict[str, list[_Slot[T]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: BaseException | None = None
        self._broke = False

    # Caller's thread

    def stop(self) -> None:
        """Cancel everything and wait for the loop; a feeder stuck in its input is left behind, it holds nothing."""
        self._stopped.set()
        self.window.release()
        if self.thread.is_alive() and self._started.wait(5.0) and (main := self._main):
            with contextlib.suppress(RuntimeError):  # the loop is gone already
                self._loop.call_soon_threadsafe(main.cancel)
            self.thread.join(5.0)

    # Feeder's thread

    def _feed(self) -> None:
        try:
            for item, request in self._requests:
                slot = _Slot(item, request)
                self.order.put(slot)
                self._loop.call_soon_threadsafe(self._inbox.put_nowait, slot)
                self.window.acquire()
                if self._stopped.is_set():
                    return
        except BaseException as error:
            self._break(error)
        finally:
            self.order.put(None)

    def _break(self, error: BaseException) -> None:
        """Raise `error` in the caller's thread when it gets to this place."""
        broken: _Slot[Any] = _Slot(None, Request((), 0))
        broken.outcome.set_exception(error)
        self.order.put(broken)

    # Loop's thread

    def _run(self) -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(self._serve())
        except BaseException as error:
            self._break(error)
        finally:
            self._started.set()

    async def _serve(self) -> None:
        endpoint = self.client.endpoint
        self._loop, self._inbox = asyncio.get_running_loop(), asyncio.Queue[_Slot[T]]()
        self._main, self._places = asyncio.current_task(), asyncio.Semaphore(endpoint.concurrency)
        self._settled, self._probed = asyncio.Event(), asyncio.Event()
        self._started.set()
        api = openai.AsyncOpenAI(
            base_url=endpoint.address, api_key=self.client.key or "none", max_retries=0, timeout=endpoint.timeout
        )
        self._create = api.chat.completions.with_raw_response.create
        threading.Thread(target=self._feed, name="chat-feeder", daemon=True).start()
        try:
            async with api, asyncio.TaskGroup() as group:
                while True:
                    slot = await self._inbox.get()
                    try:
                        await self._admit(slot, group)
                    except Exception as error:
                        self._halt(error)
                        slot.outcome.set_exception(error)
        finally:
            self.client.budget.settle(self.client.budget.reserved, None)  # of tasks cancelled before they began

    async def _admit(self, slot: _Slot[T], group: asyncio.TaskGroup) -> None:
        """Answer `slot` from the journal or from its twin in flight, or send it as soon as the limits allow."""
        client, request = self.client, slot.request
        if self._failed:
            raise self._failed
        key = request_key(client.endpoint.model, request)
        if (held := client.journal.get(key)) is not None:
            slot.outcome.set_result(Answer(**held, cached=True))
            return
        if key in self._asking:
            self._asking[key].append(slot)
            return
        worst = client.worst_case(request)
        if not self._broke:
            await self._places.acquire()
            await self._keep_pace(request)
            self._broke = not await self._reserve(worst)
            if self._broke:
                self._places.release()
        if self._failed:
            raise self._failed
        if self._broke:
            slot.outcome.set_result(Unasked("budget exhausted"))
            return
        self._asking[key] = [slot]
        task = group.create_task(self._see_through(key, request, worst))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if not self._probed.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PROBE):
                    await self._probed.wait()
            self._probed.set()

    async def _reserve(self, worst: Usage) -> bool:
        """Reserve `worst`, waiting for calls in flight where that may help; False when the budget cannot hold it."""
        while not self.client.budget.reserve(worst):
            if not self.client.budget.may_fit_later(worst):
                return False
            self._settled.clear()
            await self._settled.wait()
        return True

    async def _keep_pace(self, request: Request) -> None:
        await self.client.requests_per_minute.take(1)
        await self.client.tokens_per_minute.take(estimate_prompt_tokens(request.messages) + request.max_tokens)

    async def _see_through(self, key: str, request: Request, worst: Usage) -> None:
        """Ask, journal, then tell everybody who waits for this answer."""
        try:
            outcome = await self._ask(request, worst)
            if isinstance(outcome, Answer):
                paid = {name: value for name, value in asdict(outcome).items() if name != "cached"}
                self.client.journal.append(key, paid)
                self.client.succeed()
        except Exception as error:
            self._halt(error)
            return
        finally:
            self._places.release()
        first, *twins = self._asking.pop(key)
        first.outcome.set_result(outcome)
        for twin in twins:
            twin.outcome.set_result(replace(outcome, cached=True) if isinstance(outcome, Answer) else outcome)

    async def _ask(self, request: Request, worst: Usage) -> Answer | Failure:
        """All attempts at one request; `worst` is already reserved for the first."""
        client, endpoint, clock = self.client, self.client.endpoint, self._loop.time
        deadline = clock() + endpoint.patience
        attempt = 0
        while True:
            attempt += 1
            result = await self._attempt(request, worst, min(endpoint.timeout, deadline - clock()))
            if isinstance(result, Answer):
                client.reached = True
                return result
            client.reached = client.reached or not result.unreachable
            if not client.reached and attempt >= _FIRST_TRIES:
                break
            wait = max(result.wait, random.uniform(0.0, min(BACKOFF_CAP, BACKOFF_BASE * 2 ** (attempt - 1))))
            if not result.retry or result.fatal or attempt > endpoint.retries or clock() + wait >= deadline:
                break
            client.progress.note(f"{result.reason}, again in {wait:.1f} s: {client.redact(result.detail)}")
            await asyncio.sleep(wait)
            await self._keep_pace(request)
            if not await self._reserve(worst):
                break
        client.fail(result)
        return Failure(result.reason, attempt, client.redact(result.detail))

    async def _attempt(self, request: Request, worst: Usage, seconds: float) -> Answer | Trouble:
        """One call, and the settling of its reservation however it ends."""
        client, used = self.client, None
        try:
            result = await self._call(request, seconds)
            if isinstance(result, Trouble):
                used = result.used
                return result
            used = result.usage or Usage(estimate_prompt_tokens(request.messages), estimate_text_tokens(result.text))
            client.learn(request, used)
            model, guessed = result.model or client.endpoint.model, result.usage is None
            return Answer(result.text, *used, result.finish_reason, model, cached=False, estimated=guessed)
        finally:
            client.budget.settle(worst, used)
            self._settled.set()
            self._probed.set()

    async def _call(self, request: Request, seconds: float) -> Reply | Trouble:
        endpoint = self.client.endpoint
        # OpenAI's newer models refuse the older name, other servers may not know the newer one.
        limit = "max_completion_tokens" if endpoint.official else "max_tokens"
        body: dict[str, Any] = {
            "model": endpoint.model,
            "messages": [{"role": role, "content": content} for role, content in request.messages],
            "temperature": request.temperature,
            "top_p": request.top_p,
            limit: request.max_tokens,
        }
        if request.stop:
            body["stop"] = list(request.stop)
        try:
            async with asyncio.timeout(seconds):
                # As extra_body the messages escape the SDK's walk over typed dictionaries, a third of its time.
                response = await self._create(model=endpoint.model, messages=[], extra_body=body)
        except (openai.OpenAIError, TimeoutError) as error:
            return read_error(error)
        except UnicodeEncodeError as error:  # a lone surrogate, which no JSON body can hold
            return Trouble("not valid Unicode", str(error), retry=False)
        return read_reply(response.content)

    def _halt(self, error: BaseException) -> None:
        """Stop asking: whoever waits gets `error`, and so will all who come."""
        self._failed = error
        for slots in self._asking.values():
            for slot in slots:
                slot.outcome.set_exception(error)
        self._asking.clear()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
