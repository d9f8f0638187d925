"""The loop that sees requests through: journal, limits, attempts, and who gets to know the outcome.

Requests come in steps. What the journal holds is answered at once, and so is what is being asked already, when its
answer comes. The rest is admitted one call at a time, in order, as the places in flight, the rate limits and the budget
allow. Samples of one conversation share a call where the server can give several. Everything here runs in one thread
with an event loop of its own, except `start`, `ask` and `stop`, which belong to the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import aiohttp
import openai

from pomona.models.budget import Usage, estimate_prompt_tokens
from pomona.models.endpoint import Answer, Failure, Outcome, Request, Unasked, request_key
from pomona.models.reply import MAX_BODY, Reply, Trouble, read_error, read_reply
from pomona.models.samples import Call, calls, deal

if TYPE_CHECKING:
    from pomona.models.chat import ChatClient

BACKOFF_BASE = 0.5  # seconds; the n-th retry waits up to base · 2^(n-1), uniformly
BACKOFF_CAP = 60.0
_FIRST_TRIES = 3  # attempts at an address that never took a connection; more would only delay the message
_KEPT = tuple(part.name for part in fields(Answer) if part.name != "cached")  # in the journal
_PROBE = 2.0  # seconds the first request goes alone: a wrong key or address costs one call, not `concurrency`


@dataclass(slots=True, eq=False)
class Step:
    """Requests asked together; `done` is called in the loop's thread: with their outcomes, or what ended the run."""

    requests: Sequence[Request]
    done: Callable[[list[Outcome] | BaseException], None]
    outcomes: dict[int, Outcome] = field(default_factory=dict)


class Asker:
    """One pass over a client's requests; its thread is named "chat"."""

    def __init__(self, client: ChatClient) -> None:
        self._client = client
        self._thread = threading.Thread(target=self._run, name="chat", daemon=True)
        self._begun: Future[None] = Future()
        self._steps: set[Step] = set()
        self._waiting: dict[str, list[tuple[Step, int]]] = {}  # by key: who is to be told
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        self._failed: BaseException | None = None
        self._broke = False

    # Caller's thread

    def start(self) -> None:
        """Begin; raises what stands in the way."""
        self._thread.start()
        self._begun.result()

    def ask(self, step: Step) -> None:
        """Have `step` answered; from any thread."""
        self._loop.call_soon_threadsafe(self._open, step)

    def stop(self) -> None:
        """Cancel everything and wait for the loop."""
        if self._thread.is_alive():
            with contextlib.suppress(Exception):  # it never began, or is gone already
                self._begun.result(5.0)
                self._loop.call_soon_threadsafe(self._cancel)
            self._thread.join(5.0)

    # Loop's thread

    def _run(self) -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(self._serve())
        except BaseException as error:
            if self._begun.done():
                self._fail(error)
            else:
                self._begun.set_exception(error)

    async def _serve(self) -> None:
        client, endpoint = self._client, self._client.endpoint
        self._loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        self._cancel = main.cancel
        self._places, self._inbox = asyncio.Semaphore(endpoint.concurrency), asyncio.Queue[Call]()
        self._settled, self._probed, self._landed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        # As many connections as requests in flight, kept; the kind of `limits` is the SDK's own choice of library.
        limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
            max_connections=endpoint.concurrency, max_keepalive_connections=endpoint.concurrency
        )
        api = openai.AsyncOpenAI(
            base_url=endpoint.address,
            api_key=client.key or "none",
            max_retries=0,  # the retries here are the only ones
            timeout=endpoint.timeout,
            http_client=openai.DefaultAioHttpClient(limits=limits),
        )
        self._create = api.chat.completions.with_streaming_response.create
        try:
            async with api, asyncio.TaskGroup() as group:
                self._begun.set_result(None)
                while True:
                    call = await self._inbox.get()
                    try:
                        await self._admit(call, group)
                    except Exception as error:
                        self._halt(error)
        finally:
            client.budget.settle(client.budget.reserved, None)  # of tasks cancelled before they began

    def _open(self, step: Step) -> None:
        """Answer what is known, join what is being asked, and line up the rest."""
        client = self._client
        if self._failed:
            step.done(self._failed)
            return
        self._steps.add(step)
        fresh: dict[str, Request] = {}
        try:
            for place, request in enumerate(step.requests):
                key = request_key(client.endpoint.model, request)
                if (held := client.journal.get(key)) is not None:
                    step.outcomes[place] = Answer(**held, cached=True)
                elif key in self._waiting:
                    self._waiting[key].append((step, place))
                else:
                    self._waiting[key] = [(step, place)]
                    fresh[key] = request
        except Exception as error:
            self._halt(error)
            return
        for call in calls(fresh):
            self._inbox.put_nowait(call)
        self._deliver(step)

    def _deliver(self, step: Step) -> None:
        """Hand the outcomes over if they are complete."""
        if len(step.outcomes) == len(step.requests):
            self._steps.discard(step)
            step.done([step.outcomes[place] for place in range(len(step.requests))])

    def _settle(self, key: str, outcome: Outcome) -> None:
        """Tell everybody who waits for this answer; only the first paid for it."""
        for step, place in self._waiting.pop(key):
            step.outcomes[place] = outcome
            self._deliver(step)
            if isinstance(outcome, Answer):
                outcome = replace(outcome, cached=True)

    def _fail(self, error: BaseException) -> None:
        """Give `error` to whoever waits, and to all who come."""
        self._failed = error
        for step in self._steps:
            step.done(error)
        self._steps.clear()
        self._waiting.clear()

    def _halt(self, error: BaseException) -> None:
        """Stop asking because of `error`."""
        self._fail(error)
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def _admit(self, call: Call, group: asyncio.TaskGroup) -> None:
        """Send `call` as soon as the limits allow."""
        if len(call.requests) > 1 and not self._client.dialect.takes_n:
            for single in call.singles():
                await self._admit(single, group)
            return
        worst = self._worst_case(call)
        if not self._broke and not self._failed:
            await self._places.acquire()
            self._broke = not await self._reserve(worst)
            if self._broke:
                self._places.release()
        if self._failed:
            return
        if self._broke:
            for key in call.requests:
                self._settle(key, Unasked("budget exhausted"))
            return
        task = group.create_task(self._hold_place(call, worst))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if not self._probed.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PROBE):
                    await self._probed.wait()
            self._probed.set()

    def _worst_case(self, call: Call) -> Usage:
        return self._client.worst_case(call.first, len(call.requests))

    async def _reserve(self, worst: Usage) -> bool:
        """Reserve `worst`, waiting for calls in flight where that may help; False when the budget cannot hold it."""
        while not self._client.budget.reserve(worst):
            if not self._client.budget.may_fit_later(worst):
                return False
            self._settled.clear()
            await self._settled.wait()
        return True

    async def _hold_place(self, call: Call, worst: Usage) -> None:
        try:
            await self._see_through(call, worst)
        except Exception as error:
            self._halt(error)
        finally:
            self._places.release()

    async def _see_through(self, call: Call, worst: Usage) -> None:
        """All attempts at `call`; `worst` is already reserved for the first."""
        client, endpoint, clock = self._client, self._client.endpoint, self._loop.time
        deadline = clock() + endpoint.patience
        attempt = 0
        while True:
            attempt += 1
            queued = clock()
            episode = await self._turn(call)
            deadline += clock() - queued
            result = await self._attempt(call, worst, min(endpoint.timeout, deadline - clock()), episode)
            if isinstance(result, list):
                left = self._take(call, result, attempt)
                if left is None:
                    return
                call, result = left
            client.reached = client.reached or not result.unreachable
            if not client.reached and attempt >= _FIRST_TRIES:
                break
            wait = max(result.wait, random.uniform(0.0, min(BACKOFF_CAP, BACKOFF_BASE * 2 ** (attempt - 1))))
            if not result.retry or result.fatal or attempt > endpoint.retries or result.wait > endpoint.max_wait:
                break
            if clock() + wait >= deadline:
                break
            client.progress.note(f"{result.reason}, again in {wait:.1f} s: {client.redact(result.detail)}")
            await asyncio.sleep(wait)
            worst = self._worst_case(call)
            if not await self._reserve(worst):
                break
        client.fail(result)
        for key in call.requests:
            self._settle(key, Failure(result.reason, attempt, client.redact(result.detail)))

    async def _turn(self, call: Call) -> int:
        """Wait until the congestion window and the rate limits let a call pass; returns the episode it belongs to."""
        window = self._client.window
        while self._in_flight >= window.limit:
            self._landed.clear()
            await self._landed.wait()
        self._in_flight += 1
        await self._keep_pace(call)
        return window.episode

    async def _keep_pace(self, call: Call) -> None:
        client, request = self._client, call.first
        await client.requests_per_minute.take(1)
        tokens = estimate_prompt_tokens(request.messages) + request.max_tokens * len(call.requests)
        await client.tokens_per_minute.take(tokens)

    async def _attempt(
        self, call: Call, worst: Usage, seconds: float, episode: int
    ) -> list[Answer | Trouble] | Trouble:
        """One call, and the settling of its reservation however it ends."""
        client, used = self._client, None
        try:
            reply = await self._send(call, seconds)
            if isinstance(reply, Trouble):
                used = reply.used
                if reply.overrun:
                    client.window.narrow(episode)
                return reply
            client.window.widen()
            dealt, used = deal(call, reply, client.endpoint.model)
            if used is not None:
                client.learn(call.first, len(call.requests), used)
            return dealt
        finally:
            self._in_flight -= 1
            self._landed.set()
            client.budget.settle(worst, used)
            self._settled.set()
            self._probed.set()

    async def _send(self, call: Call, seconds: float) -> Reply | Trouble:
        """What comes back, after the server has been asked in a way that it takes."""
        client, dialect = self._client, self._client.dialect
        while True:
            body = dialect.body(call.first, len(call.requests))
            try:
                async with asyncio.timeout(seconds):
                    content = await self._post(body)
            except (openai.OpenAIError, aiohttp.ClientError, TimeoutError) as error:
                trouble = read_error(error)
                if not isinstance(error, openai.APIStatusError) or trouble.reason not in ("http 400", "http 422"):
                    return trouble
                if not dialect.give_way(body, error.response.content):
                    return trouble
                await self._keep_pace(call)
                continue
            except UnicodeEncodeError as error:  # a lone surrogate, which no JSON body can hold
                return Trouble("not valid Unicode", str(error), retry=False)
            reply = read_reply(content, empty_is_final=client.endpoint.empty_is_final)
            if isinstance(reply, Reply) and len(reply.choices) < len(call.requests):
                dialect.do_without("n", "ignored, samples are asked for one at a time")
            return reply

    async def _post(self, body: dict[str, Any]) -> bytes:
        """The body of a 200, or as much of it as shows that it is too long."""
        content = bytearray()
        # As extra_body the messages escape the SDK's walk over typed dictionaries, a third of its time.
        async with self._create(model=self._client.endpoint.model, messages=[], extra_body=body) as response:
            try:
                async for part in response.iter_bytes():
                    content += part
                    if len(content) > MAX_BODY:
                        break
            except Exception as error:  # of whichever library it reads with; the SDK would say it so
                raise openai.APIConnectionError(request=response.http_request) from error
        return bytes(content)

    def _take(self, call: Call, dealt: list[Answer | Trouble], attempt: int) -> tuple[Call, Trouble] | None:
        """Journal what was answered, then tell of it; returns what is to be asked again, and why.

        Samples for which no choice came are lined up, each as a call of its own.
        """
        client = self._client
        results = dict(zip(call.requests, dealt, strict=False))
        answers = {key: result for key, result in results.items() if isinstance(result, Answer)}
        if answers:
            client.journal.append_all({key: _paid(answer) for key, answer in answers.items()})
            client.succeed()
        troubled: dict[str, Request] = {}
        for key, request in call.requests.items():
            result = results.get(key)
            if result is None:
                self._inbox.put_nowait(Call({key: request}))
            elif isinstance(result, Answer):
                self._settle(key, result)
            elif result.final:
                said = client.redact(result.detail)
                self._settle(key, Failure(result.reason, attempt, said, result.finish_reason))
            else:
                troubled[key], trouble = request, result
        return (Call(troubled), trouble) if troubled else None


def _paid(answer: Answer) -> dict[str, Any]:
    """What the journal keeps of an answer."""
    return {name: getattr(answer, name) for name in _KEPT}
