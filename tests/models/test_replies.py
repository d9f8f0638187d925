"""Outcomes told apart: silence, refusals, overflows, endless bodies, and servers that ask to wait."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from itertools import pairwise
from typing import Any

import pytest

from endpoints import client, question, surroundings  # noqa: F401
from loopback import Loopback, Reply, Seen, answer, ok, raw, status
from pomona.errors import EndpointError, UsageError
from pomona.io.journal import Journal
from pomona.methods.alpagasus_filter.config import Config
from pomona.models import asking, reply
from pomona.models.budget import Budget, Usage
from pomona.models.chat import Answer, Failure
from pomona.models.options import EndpointOptions
from pomona.models.reply import _retry_after


def only(server: Loopback, **options: Any) -> Any:
    """What came of one question."""
    ((_, outcome),) = client(server.url, **options).answers([(0, question("q"))])
    return outcome


# Silence


def test_an_empty_reply_may_be_final(tmp_path: Any) -> None:
    journal, budget = Journal(tmp_path / "j", {}, resume=False), Budget()
    with Loopback(lambda seen: ok("", (40, 7), finish_reason="length")) as server:
        asked = client(server.url, journal, budget, empty_is_final=True)
        outcomes = [outcome for _, outcome in asked.answers((n, question(str(n))) for n in range(60))]
        assert server.calls == 60  # nothing ever came of any, and the endpoint is not at fault
    assert set(outcomes) == {Failure("empty answer", 1, "finish reason: length", "length")}
    assert (len(journal), budget.spent, budget.lost) == (0, Usage(60 * 40, 60 * 7), Usage())


def test_an_empty_sample_may_be_final_beside_full_ones() -> None:
    def draw() -> Any:
        return (yield [question("q", sample=number) for number in range(3)])

    with Loopback([ok("", (40, 9), more=["two", "three"])]) as server:
        asked = client(server.url, empty_is_final=True)
        ((_, samples),) = asked.conversations([(0, draw())])
        assert server.calls == 1
    assert samples[0] == Failure("empty answer", 1, "finish reason: stop", "stop")
    assert [(one.text, one.prompt_tokens, one.calls) for one in samples[1:]] == [("two", 40, 1), ("three", 0, 0)]
    assert sum(one.completion_tokens for one in samples[1:]) == 9


# Refusals


@pytest.mark.parametrize("final", [False, True])
def test_a_refusal_and_a_filtered_reply_are_answers(final: bool) -> None:
    declined = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
    with Loopback([raw({"choices": [{"message": declined, "finish_reason": "stop"}]})]) as server:
        outcome = only(server, empty_is_final=final)
        assert (outcome.text, outcome.finish_reason) == ("I cannot help with that.", "refusal")
    for text in ("", None, "half of a"):
        with Loopback([ok(text, finish_reason="content_filter")]) as server:
            outcome = only(server, empty_is_final=final)
            assert (outcome.text, outcome.finish_reason, server.calls) == (text or "", "content_filter", 1)
    both = {"role": "assistant", "content": "4", "refusal": "no"}
    with Loopback([raw({"choices": [{"message": both, "finish_reason": "stop"}]})]) as server:
        assert (only(server).text, server.calls) == ("4", 1)


OVERFLOWS: dict[str, Reply] = {
    "llama.cpp": raw(
        {
            "error": {
                "code": 400,
                "message": "the request exceeds the available context size, try increasing it",
                "type": "exceed_context_size_error",
                "n_prompt_tokens": 9000,
            }
        },
        400,
    ),
    "OpenAI": raw({"error": {"message": "Too many tokens.", "code": "context_length_exceeded"}}, 400),
    "vLLM": raw(
        {"object": "error", "message": "This model's maximum context length is 2048 tokens.", "code": 400}, 400
    ),
    "Anthropic": status(400, "prompt is too long: 208310 tokens > 200000 maximum"),
    "proxy": status(413, "request exceeds the context window"),
    "names a parameter": status(400, "max_tokens is not supported beyond the model's context length"),
}


@pytest.mark.parametrize("overflow", OVERFLOWS.values(), ids=OVERFLOWS.keys())
def test_a_context_overflow_has_a_name_of_its_own(overflow: Reply) -> None:
    with Loopback([overflow]) as server:
        outcome = only(server)
        assert (outcome.reason, outcome.attempts, server.calls) == ("context overflow", 1, 1)


# Size


def test_a_text_beyond_measure_is_cut() -> None:
    with Loopback([ok("é" * (reply.MAX_TEXT + 5)), ok("x" * reply.MAX_TEXT)]) as server:
        cut, whole = only(server), only(server)
    assert (len(cut.text), cut.finish_reason) == (reply.MAX_TEXT, "length")
    assert (len(whole.text), whole.finish_reason) == (reply.MAX_TEXT, "stop")


def test_a_body_without_end_is_malformed_and_is_not_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reply, asking):
        monkeypatch.setattr(module, "MAX_BODY", 1 << 20)
    sent = 0

    def pour(connection: socket.socket) -> None:
        nonlocal sent
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
            sent += 65536

    with listening(pour) as url:
        ((_, outcome),) = client(url, retries=0, timeout=30.0).answers([(0, question("q"))])
    assert (outcome.reason, outcome.attempts) == ("malformed body", 1)
    assert 1 << 20 <= sent < 32 << 20


def test_what_is_no_http_or_is_packed_wrongly_is_a_bad_connection() -> None:
    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")

    with listening(talk) as url:
        ((_, outcome),) = client(url, retries=1).answers([(0, question("q"))])
    assert (outcome.reason, outcome.attempts) == ("connection", 2)
    with Loopback([Reply(body=b"no gzip", headers=(("Content-Encoding", "gzip"),))]) as server:
        assert only(server, retries=0).reason == "connection"


@contextmanager
def listening(serve: Any) -> Iterator[str]:
    """A bare server: `serve` gets each connection, and may be cut off."""

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    serve(connection)
                except OSError:
                    continue

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        listener.shutdown(socket.SHUT_RDWR)


# Waiting


def test_retry_after_in_milliseconds_goes_first() -> None:
    assert _retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert _retry_after({"retry-after-ms": "soon", "retry-after": "9"}) == 9


def test_a_request_is_never_asked_again_before_the_time_the_server_named() -> None:
    """Every fifth request is told to wait for 1 s."""

    def script(seen: Seen) -> Reply:
        return status(429, retry_after="1") if seen.number % 5 == 0 else answer(seen)

    with Loopback(script) as server:
        asked = client(server.url, concurrency=32)
        outcomes = [outcome for _, outcome in asked.answers((n, question(str(n))) for n in range(60))]
        assert all(isinstance(outcome, Answer) for outcome in outcomes)
        at: dict[str, list[float]] = {}
        for seen in server.seen:
            at.setdefault(seen.digest, []).append(seen.at)
        waits = [later - sooner for times in at.values() for sooner, later in pairwise(times)]
    assert len(waits) >= 12
    assert min(waits) >= 1.0


@pytest.mark.parametrize("form", ["3600", "date", "ms"])
def test_a_wait_beyond_the_longest_allowed_ends_the_run_and_names_the_time(form: str) -> None:
    value = formatdate(time.time() + 3600, usegmt=True) if form == "date" else form
    headers = (("Retry-After-Ms", "3600000"),) if form == "ms" else (("Retry-After", value),)
    refusal = Reply(429, b'{"error": {"message": "come back"}}', headers)
    with Loopback(lambda seen: answer(seen) if seen.number <= 3 else refusal) as server:
        begun = time.monotonic()
        with pytest.raises(EndpointError, match="come back") as caught:
            list(client(server.url, max_wait=60.0).answers((n, question(str(n))) for n in range(100)))
        assert time.monotonic() - begun < 5
    named = re.search(r"until (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC", caught.value.message)
    assert named is not None
    until = datetime.strptime(named[1], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    assert abs(until - datetime.now(UTC) - timedelta(hours=1)) < timedelta(seconds=10)
    assert "asks to wait 1:00:00" in caught.value.message or form == "date"
    assert "--resume" in str(caught.value.hint) and "--max-wait 60" in str(caught.value.hint)


def test_a_wait_for_ever_is_named_too() -> None:
    never = status(503, retry_after="1e300")
    with Loopback(lambda seen: never) as server, pytest.raises(EndpointError, match="366 days"):
        only(server)


# The address


def test_the_address_of_the_call_itself_is_refused_with_the_right_one_as_hint() -> None:
    with pytest.raises(UsageError) as caught:
        client("http://localhost:8000/v1/chat/completions/")
    assert "http://localhost:8000/v1" in str(caught.value.hint)
    assert "completions" not in str(caught.value.hint)


def test_an_address_without_v1_that_knows_no_chat_is_told_to_add_it() -> None:
    with Loopback() as server:
        bare = server.url.removesuffix("/v1")
        with pytest.raises(EndpointError, match="http 404") as caught:
            list(client(bare).answers((n, question(str(n))) for n in range(50)))
        assert f"--base-url {server.url}" in str(caught.value.hint)


# The options


def test_the_options_say_where_to_ask_and_what_it_may_cost() -> None:
    given: dict[str, Any] = {
        "base_url": "http://h/v1",
        "api_key_env": "K",
        "concurrency": 3,
        "rpm": 4,
        "tpm": 5,
        "timeout": 6.0,
        "retries": 7,
        "max_wait": 8.0,
    }
    options = EndpointOptions(**given, max_cost=1.0, max_tokens_total=2, price_in=3.0, price_out=4.0)
    endpoint = options.endpoint("m", empty_is_final=True)
    assert {name: getattr(endpoint, name) for name in given} == given
    assert (endpoint.model, endpoint.empty_is_final) == ("m", True)
    assert options.budget() == Budget(1.0, 2, 3.0, 4.0)


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"concurrency": 0}, "--concurrency"),
        ({"rpm": 0}, "--rpm"),
        ({"timeout": float("inf")}, "--timeout"),
        ({"retries": -1}, "--retries"),
        ({"max_wait": -1.0}, "--max-wait"),
        ({"max_wait": float("nan")}, "--max-wait"),
        ({"price_in": -0.1}, "--price-in"),
        ({"max_cost": 1.0}, "--max-cost"),
    ],
)
def test_options_out_of_range_are_refused_for_every_command_that_has_them(given: dict[str, Any], flag: str) -> None:
    for build in (EndpointOptions, lambda **more: Config(judge="openai", **more)):
        with pytest.raises(UsageError, match=flag):
            build(**given)
