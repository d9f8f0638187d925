"""A scripted chat-completions server on 127.0.0.1, for tests that need real sockets and real faults.

    with Loopback(mixed(rate_limited=0.1), latency=0.05) as server:
        ...                      # point a client or a command at server.url
        assert server.peak <= 8

A script decides each reply: a function of the request seen, or a list used up in order of arrival (the default answer
follows it).
Answers derive from the request's content, so that a rerun gets the same ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as it arrived: `number` counts all requests, `attempt` those with the same content; both from 1."""

    body: dict[str, Any]
    headers: dict[str, str]
    digest: str
    number: int
    attempt: int
    at: float

    @property
    def text(self) -> str:
        """The messages' contents, joined."""
        return "\n".join(message["content"] for message in self.body["messages"])

    def chance(self, salt: str) -> float:
        """A number in [0, 1) that depends on the content, the attempt and `salt` only."""
        return int(hashlib.sha256(f"{salt}{self.attempt}{self.digest}".encode()).hexdigest()[:12], 16) / 16**12


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes back; `valid` marks an answer that a client must not lose."""

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    fate: Literal["whole", "cut", "reset", "hang"] = "whole"
    valid: bool = False
    delay: float = 0.0


Script = Callable[[Seen], Reply]


def ok(text: Any, usage: tuple[int, int] | None = (10, 1), *, more: Sequence[Any] = (), **choice: Any) -> Reply:
    """A complete answer; `usage` is (prompt tokens, completion tokens) or None to leave it out, `more` holds the texts
    of further choices."""
    messages = [{"role": "assistant", "content": content} for content in (text, *more)]
    body: dict[str, Any] = {
        "object": "chat.completion",
        "model": "loopback-1",
        "choices": [
            {"index": index, "message": message, "finish_reason": "stop", **choice}
            for index, message in enumerate(messages)
        ],
    }
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return Reply(body=json.dumps(body).encode(), valid=True)


def raw(body: Any, status: int = 200) -> Reply:
    """Any JSON value, or bytes as they are."""
    return Reply(status=status, body=body if isinstance(body, bytes) else json.dumps(body).encode())


def status(code: int, message: str = "scripted", retry_after: str | None = None) -> Reply:
    """An error status with an OpenAI-style error object."""
    headers = () if retry_after is None else (("Retry-After", retry_after),)
    return replace(raw({"error": {"message": message, "type": "scripted"}}, code), headers=headers)


RESET = Reply(fate="reset")  # the connection is aborted instead of an answer
HANG = Reply(fate="hang")  # nothing is ever sent
HTML = Reply(body=b"<html><body>Gateway login</body></html>")
CUT = replace(ok("4.5"), fate="cut", valid=False)  # the headers promise more than arrives
MALFORMED: tuple[Reply, ...] = (
    HTML,
    CUT,
    raw(b'{"choices": [{"message": {"cont'),
    raw(b"\xff\xfe"),
    raw([1, 2]),
    raw({"choices": []}),
    raw({"choices": None}),
    raw({"choices": [{"message": None}]}),
    replace(ok(None), valid=False),
    replace(ok(""), valid=False),
    raw({"error": {"message": "overloaded"}}),
)


def answer(seen: Seen) -> Reply:
    """The default: a rating from 1 to 5 fixed by the content, with a usage of one token per four characters; as many
    choices as asked for, the next rating each."""
    first, count = int(seen.digest, 16) % 5, seen.body.get("n", 1)
    ratings = [str(1 + (first + choice) % 5) for choice in range(count)]
    return ok(ratings[0], (len(seen.text) // 4 + 4 * len(seen.body["messages"]) + 3, count), more=ratings[1:])


def mixed(
    *, rate_limited: float = 0.0, server_error: float = 0.0, malformed: float = 0.0, retry_after: str = "0"
) -> Script:
    """Faults with the given probabilities, drawn anew for each attempt but always the same in a rerun."""

    def script(seen: Seen) -> Reply:
        draw = seen.chance("fault")
        if draw < rate_limited:
            return status(429, "slow down", retry_after)
        if draw < rate_limited + server_error:
            return status(500)
        if draw < rate_limited + server_error + malformed:
            return MALFORMED[int(seen.chance("kind") * len(MALFORMED))]
        return answer(seen)

    return script


class Loopback:
    """The server; enter it to start, leave it to stop.

    Read `seen` (every request, unless keep=False), `calls`, `valid` (valid answers sent), `spent` (tokens in those),
    `in_flight`, `peak`, `connections`, `dropped` (requests whose client went away before the reply).
    """

    def __init__(self, script: Script | Sequence[Reply] = answer, *, latency: float = 0.0, keep: bool = True) -> None:
        self._script = script if callable(script) else _listed(script)
        self.latency = latency
        self._keep = keep
        self.seen: list[Seen] = []
        self.calls = self.valid = self.spent = self.in_flight = self.peak = self.connections = self.dropped = 0
        self._attempts: dict[str, int] = {}
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Loopback:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        self.port: int = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._exchange(reader, writer):
                pass
        writer.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its reply; False when the connection must not be used again."""
        start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        method, target, _ = start.split()
        if method != "POST" or not target.endswith("/v1/chat/completions"):  # a whole address when it is the proxy
            return await _send(writer, status(404, "no such path"))
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            reply = self._script(self._see(json.loads(body), headers))
            if self.latency or reply.delay:
                await asyncio.sleep(self.latency + reply.delay)
            if reply.fate == "hang":
                await reader.read(1)  # until the client goes away
        finally:
            self.in_flight -= 1
        if reader.at_eof():
            self.dropped += 1
            return False
        if reply.valid:
            self.valid += 1
            self.spent += json.loads(reply.body).get("usage", {}).get("total_tokens", 0)
        return await _send(writer, reply)

    def _see(self, body: dict[str, Any], headers: dict[str, str]) -> Seen:
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        self.calls += 1
        if self._keep:
            self._attempts[digest] = self._attempts.get(digest, 0) + 1
        seen = Seen(body, headers, digest, self.calls, self._attempts.get(digest, 1), time.monotonic())
        if self._keep:
            self.seen.append(seen)
        return seen


async def _send(writer: asyncio.StreamWriter, reply: Reply) -> bool:
    if reply.fate == "reset":
        linger = struct.pack("ii", 1, 0)  # close() then sends RST
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        return False
    kind = "text/html" if reply.body.startswith(b"<") else "application/json"
    head = [f"HTTP/1.1 {reply.status} {REASONS.get(reply.status, 'Scripted')}", f"Content-Type: {kind}"]
    head += [f"{name}: {value}" for name, value in (*reply.headers, ("Content-Length", str(len(reply.body))))]
    whole = reply.fate == "whole"
    writer.write("\r\n".join([*head, "", ""]).encode() + (reply.body if whole else reply.body[: len(reply.body) // 2]))
    await writer.drain()
    return whole


def _listed(replies: Sequence[Reply]) -> Script:
    remaining = iter(replies)
    return lambda seen: next(remaining, None) or answer(seen)
