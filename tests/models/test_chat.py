"""The chat client against a real socket: limits kept, faults survived, nothing paid for twice or lost."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import openai
import pytest

from endpoints import KEY, surroundings  # noqa: F401
from loopback import CUT, HANG, HTML, RESET, Loopback, Reply, Seen, answer, mixed, ok, raw, status
from pomona.errors import DataError, EndpointError, UsageError
from pomona.io.journal import Journal, NoJournal
from pomona.models import asking, chat
from pomona.models.budget import Budget, Pace, Usage, estimate_prompt_tokens, prompt_bound
from pomona.models.chat import Answer, ChatClient, Endpoint, Failure, Request, Unasked, request_key
from pomona.models.endpoint import redact
from pomona.models.reply import RETRY_AFTER_CAP, _retry_after
from pomona.runtime.progress import Quiet

USED = Usage(55, 1)  # what the loopback counts for one `question`


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "answers.jsonl", {"of": "test"}, resume=False)
    yield opened
    opened.close()


def client(url: str, journal: Any = None, budget: Budget | None = None, **options: Any) -> ChatClient:
    endpoint = Endpoint(url, "judge", **{"concurrency": 8, "timeout": 5.0, **options})
    return ChatClient(endpoint, NoJournal() if journal is None else journal, budget or Budget(), Quiet())


def question(number: int, length: int = 160) -> Request:
    text = f"Rate reply number {number}. "
    return Request((("system", "You rate replies."), ("user", text + "x" * (length - len(text)))), max_tokens=16)


def questions(count: int) -> list[tuple[int, Request]]:
    return [(number, question(number)) for number in range(count)]


def expected(request: Request) -> str:
    """The rating that the loopback's default script gives, computed without a server."""
    import hashlib
    import json

    body = {
        "model": "judge",
        "messages": [{"role": role, "content": content} for role, content in request.messages],
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 16,
    }
    return str(1 + int(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(), 16) % 5)


# One fault at a time


FAULTS: dict[str, tuple[Reply, str]] = {
    "http 500": (status(500), "http 500"),
    "http 503": (status(503), "http 503"),
    "http 408": (status(408), "http 408"),
    "http 409": (status(409), "http 409"),
    "429": (status(429, retry_after="0"), "rate limited"),
    "reset": (RESET, "connection"),
    "hang": (HANG, "timeout"),
    "cut": (CUT, "connection"),
    "html": (HTML, "malformed body"),
    "torn json": (raw(b'{"choices": [{"mess'), "malformed body"),
    "not utf-8": (raw(b"\xff\xfe"), "malformed body"),
    "nan": (raw(b'{"choices": NaN}'), "malformed body"),
    "empty body": (raw(b""), "malformed body"),
    "list": (raw([1, 2]), "malformed body"),
    "null": (raw(None), "malformed body"),
    "no choices": (raw({}), "no choices"),
    "empty choices": (raw({"choices": []}), "no choices"),
    "null choices": (raw({"choices": None}), "no choices"),
    "choice of text": (raw({"choices": ["4.5"]}), "no choices"),
    "null message": (raw({"choices": [{"message": None}]}), "empty answer"),
    "null content": (ok(None), "empty answer"),
    "empty content": (ok(""), "empty answer"),
    "blank content": (ok(" \n"), "empty answer"),
    "numeric content": (ok(4.5), "empty answer"),
    "error in a 200": (raw({"error": {"message": "overloaded"}}), "error in body"),
}


@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS.keys())
def test_a_passing_fault_is_retried_and_a_lasting_one_is_named(fault: Reply, reason: str) -> None:
    request = question(1)
    with Loopback([fault]) as server:
        asked = client(server.url, timeout=0.5 if fault is HANG else 5.0)
        assert [outcome.text for _, outcome in asked.answers([(0, request)])] == [expected(request)]
        assert server.calls == 2
    with Loopback(lambda seen: fault) as server:
        asked = client(server.url, timeout=0.2 if fault is HANG else 5.0, retries=2)
        (outcome,) = [outcome for _, outcome in asked.answers([(0, request)])]
        assert isinstance(outcome, Failure)
        assert (outcome.reason, outcome.attempts, server.calls) == (reason, 3, 3)


@pytest.mark.parametrize("code", [400, 404, 413, 422])
def test_a_refused_request_fails_alone_and_at_once(code: int) -> None:
    def script(seen: Seen) -> Reply:
        return status(code, f"too long, {KEY}") if "number 3." in seen.text else answer(seen)

    with Loopback(script) as server:
        outcomes = [outcome for _, outcome in client(server.url).answers(questions(8))]
        assert server.calls == 8
    assert outcomes[3] == Failure(f"http {code}", 1, "too long, [redacted]")
    assert sum(isinstance(outcome, Answer) for outcome in outcomes) == 7


def test_text_parts_are_joined() -> None:
    parts = [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "4"}, {"type": "text", "text": ".5"}]
    with Loopback([ok(parts, (12, 3), finish_reason="length")]) as server:
        ((_, outcome),) = client(server.url).answers([(0, question(0))])
    assert outcome == Answer("4.5", 12, 3, "length", "loopback-1", cached=False)


def test_a_request_that_no_json_can_hold_fails_alone() -> None:
    broken = Request((("user", "half a pair: \ud83c"),), 16)
    with Loopback() as server:
        outcomes = [outcome for _, outcome in client(server.url).answers([(0, broken), (1, question(1))])]
    assert isinstance(outcomes[0], Failure)
    assert outcomes[0].reason == "not valid Unicode"
    assert isinstance(outcomes[1], Answer)


# Waiting


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("0.5", 0.5),
        ("-3", 0),
        ("soon", 0),
        ("", 0),
        ("nan", 0),
        ("1e9", RETRY_AFTER_CAP),
        ("inf", RETRY_AFTER_CAP),
    ],
)
def test_retry_after_in_seconds(value: str, seconds: float) -> None:
    assert _retry_after({"retry-after": value}) == seconds


def test_retry_after_as_a_date() -> None:
    assert _retry_after({"retry-after": formatdate(time.time() + 100, usegmt=True)}) == pytest.approx(100, abs=2)
    assert _retry_after({"retry-after": formatdate(time.time() - 100, usegmt=True)}) == 0
    assert _retry_after({}) == 0


def test_retry_after_is_waited_for_though_the_backoff_is_shorter() -> None:
    with Loopback([status(429, retry_after="0.4"), status(503, retry_after="0.3")]) as server:
        list(client(server.url).answers([(0, question(0))]))
        first, second, third = (seen.at for seen in server.seen)
    assert second - first >= 0.4
    assert third - second >= 0.3


def test_a_wait_beyond_the_patience_is_not_begun() -> None:
    with Loopback(lambda seen: status(429, retry_after="100")) as server:
        begun = time.monotonic()
        ((_, outcome),) = client(server.url, patience=2.0).answers([(0, question(0))])
    assert outcome == Failure("rate limited", 1, "scripted")
    assert time.monotonic() - begun < 2.0


def test_backoff_grows_to_its_cap_with_full_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(asking, "BACKOFF_BASE", 0.001)
    monkeypatch.setattr(asking, "BACKOFF_CAP", 0.004)
    monkeypatch.setattr(asking.random, "uniform", lambda low, high: limits.append(high) or low)  # type: ignore[attr-defined]
    with Loopback(lambda seen: status(500)) as server:
        list(client(server.url, retries=4).answers([(0, question(0))]))
    assert limits == [0.001, 0.002, 0.004, 0.004, 0.004]


def test_in_flight_reaches_the_concurrency_and_never_passes_it() -> None:
    with Loopback(latency=0.03) as server:
        outcomes = list(client(server.url, concurrency=7).answers(questions(60)))
        assert (len(outcomes), server.peak) == (60, 7)


def test_pace_lets_no_minute_pass_more_than_its_share() -> None:
    now = 0.0
    pace, sent = Pace(600, lambda: now), []
    for step in range(3000):
        now += pace.delay(1)
        sent.append(now)
        now += 30.0 if step == 1500 else 0.0  # an idle spell saves up one second's worth, not thirty
    for index, at in enumerate(sent):
        inside = sum(at <= other < at + 60.0 for other in sent[index : index + 700])
        assert inside <= 600 + 600 // 60 + 1
    assert sent[1500] == pytest.approx(150.0)


def test_pace_of_tokens_charges_by_amount_and_admits_an_oversized_one() -> None:
    now = 0.0
    pace = Pace(6000, lambda: now)
    assert pace.delay(9000) == 0.0
    assert pace.delay(1) == pytest.approx(90.0)
    assert Pace(None).delay(10**9) == 0.0
    with pytest.raises(UsageError):
        Pace(0)


def test_requests_keep_to_the_rate() -> None:
    with Loopback() as server:
        list(client(server.url, rpm=1200).answers(questions(12)))
        span = server.seen[-1].at - server.seen[0].at
    assert span >= 11 * 0.05 - 0.25  # what the set-up took may be saved up


# Order, input, and the caller


def test_order_is_kept_when_answers_come_back_shuffled() -> None:
    def script(seen: Seen) -> Reply:
        reply = answer(seen)
        return Reply(body=reply.body, delay=0.1 * seen.chance("delay"))

    with Loopback(script) as server:
        pairs = list(client(server.url, concurrency=16).answers(questions(80)))
    assert [item for item, _ in pairs] == list(range(80))
    assert [outcome.text for _, outcome in pairs] == [expected(request) for _, request in questions(80)]


def test_an_error_of_the_input_is_raised_in_its_place() -> None:
    def requests() -> Iterator[tuple[int, Request]]:
        yield from questions(3)
        raise DataError("line 4: torn")

    with Loopback() as server:
        answers = client(server.url).answers(requests())
        assert [next(answers)[0] for _ in range(3)] == [0, 1, 2]
        with pytest.raises(DataError, match="line 4"):
            next(answers)


def test_answers_flow_while_the_input_is_stalled() -> None:
    more = threading.Event()

    def requests() -> Iterator[tuple[int, Request]]:
        yield from questions(2)
        assert more.wait(20)
        yield 2, question(2)

    with Loopback() as server:
        answers = client(server.url).answers(requests())
        assert [next(answers)[0], next(answers)[0]] == [0, 1]
        more.set()
        assert [item for item, _ in answers] == [2]


def test_work_goes_on_between_answers_and_stays_within_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_WINDOW", 64)
    pulled = 0

    def requests() -> Iterator[tuple[int, Request]]:
        nonlocal pulled
        while True:
            pulled += 1
            yield pulled, question(pulled)

    with Loopback() as server:
        answers = client(server.url).answers(requests())
        next(answers)
        _until(lambda: server.valid >= 60)
        assert pulled <= 66
        for _ in range(200):
            next(answers)
        assert pulled <= 201 + 66
        answers.close()  # type: ignore[attr-defined]


def test_finished_requests_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_WINDOW", 32)
    with Loopback(keep=False) as server:
        for item, _ in client(server.url).answers((number, question(number)) for number in range(121)):
            if item == 120:
                assert sum(isinstance(thing, Request) for thing in gc.get_objects()) < 80


def test_closing_early_cancels_what_is_in_flight() -> None:
    with Loopback(lambda seen: answer(seen) if seen.number == 1 else HANG) as server:
        answers = client(server.url, timeout=60).answers(questions(50))
        next(answers)
        _until(lambda: server.in_flight == 8)
        begun = time.monotonic()
        answers.close()  # type: ignore[attr-defined]
        assert time.monotonic() - begun < 2.0
        _until(lambda: server.in_flight == 0)
        assert server.calls == 9
    assert not [thread for thread in threading.enumerate() if thread.name == "chat"]


def test_an_interrupt_while_waiting_stops_promptly() -> None:
    with Loopback(lambda seen: HANG) as server:
        answers = client(server.url, timeout=60).answers(questions(5))
        timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            next(answers)
        assert time.monotonic() - begun < 3.0
        _until(lambda: server.in_flight == 0)
    assert not [thread for thread in threading.enumerate() if thread.name == "chat"]


# The journal


def test_every_paid_answer_is_kept_through_a_storm_of_faults(journal: Journal) -> None:
    script = mixed(rate_limited=0.10, server_error=0.05, malformed=0.02, retry_after="0.05")
    asked = questions(500)
    with Loopback(script) as server:
        pairs = list(client(server.url, journal, concurrency=16, retries=1).answers(asked))
        assert server.peak <= 16
        assert server.calls > 500
    assert [item for item, _ in pairs] == list(range(500))
    answered = {item for item, outcome in pairs if isinstance(outcome, Answer)}
    failed = {item for item, outcome in pairs if isinstance(outcome, Failure)}
    assert len(answered) + len(failed) == 500
    assert failed  # with one retry only some are given up, and named
    assert server.valid == len(journal) == len(answered)
    for number, request in asked:
        kept = journal.get(request_key("judge", request))
        assert (kept is not None) == (number in answered)
        assert kept is None or kept["text"] == expected(request)
    tries: dict[str, list[Seen]] = {}
    for seen in server.seen:
        tries.setdefault(seen.digest, []).append(seen)
    for first, *later in tries.values():
        if later and script(first).status == 429:
            assert later[0].at - first.at >= 0.05


def test_an_answer_is_in_the_journal_before_it_is_seen_and_costs_nothing_again(journal: Journal) -> None:
    asked = questions(20)
    with Loopback() as server:
        fresh = []
        for number, outcome in client(server.url, journal).answers(asked):
            assert journal.get(request_key("judge", asked[number][1])) is not None
            fresh.append(outcome)
        again = client(server.url, journal, budget := Budget(max_tokens=0))
        repeated = [outcome for _, outcome in again.answers(asked)]
        assert server.calls == 20
    assert [(one.text, one.prompt_tokens) for one in repeated] == [(one.text, one.prompt_tokens) for one in fresh]
    assert all(one.cached for one in repeated)
    assert not any(one.cached for one in fresh)
    assert budget.spent_tokens == 0


def test_identical_requests_in_flight_are_asked_once() -> None:
    asked = [(0, question(0)), *((number, question(7)) for number in range(1, 7))]
    with Loopback(latency=0.2) as server:
        budget = Budget()
        outcomes = [outcome for _, outcome in client(server.url, budget=budget).answers(asked)]
        assert server.calls == 2
        assert budget.spent_tokens == server.spent
    assert {outcome.text for outcome in outcomes[1:]} == {expected(question(7))}
    assert [outcome.cached for outcome in outcomes] == [False, False, True, True, True, True, True]


def test_the_key_of_a_request_depends_on_all_that_decides_the_answer() -> None:
    base = Request((("user", "a"), ("user", "b")), 16)
    others = [
        Request((("user", "a\nb"),), 16),
        Request((("user", "b"), ("user", "a")), 16),
        Request((("system", "a"), ("user", "b")), 16),
        Request(base.messages, 17),
        Request(base.messages, 16, temperature=0.5),
        Request(base.messages, 16, top_p=0.5),
        Request(base.messages, 16, stop=("\n",)),
    ]
    keys = {request_key("m", request) for request in [base, *others]} | {request_key("n", base)}
    assert len(keys) == 9
    assert request_key("m", base) == request_key("m", Request((("user", "a"), ("user", "b")), 16))


# The budget


@pytest.mark.parametrize("faults", [{}, {"rate_limited": 0.05, "server_error": 0.05, "malformed": 0.02}])
def test_half_a_budget_is_never_passed_and_a_rerun_pays_only_the_rest(
    journal: Journal, faults: dict[str, float]
) -> None:
    asked = questions(500)
    prices = {"price_in": 3.0, "price_out": 15.0}
    cap = 250 * Budget(**prices).cost(USED)
    with Loopback(mixed(**faults)) as server:
        budget = Budget(max_cost=cap, **prices)
        first = [outcome for _, outcome in client(server.url, journal, budget, concurrency=16).answers(asked)]
        paid = server.valid
        assert server.spent == paid * sum(USED)
        assert budget.spent_cost <= cap
        assert budget.reserved == Usage()
        worst = Usage(prompt_bound(question(0).messages), 16)
        left = cap - budget.cost(budget.spent.plus(budget.lost))
        assert 0.0 <= left < budget.cost(worst)  # what is left could not have paid for another
        kinds = [type(outcome) for outcome in first]
        assert kinds.index(Unasked) == 500 - kinds.count(Unasked)
        rest = [outcome for _, outcome in client(server.url, journal, Budget(), concurrency=16).answers(asked)]
        assert all(isinstance(outcome, Answer) for outcome in rest)
        assert sum(outcome.cached for outcome in rest) == paid
        assert server.valid == len(journal) == 500
        assert len({seen.digest for seen in server.seen}) == 500
        assert faults or server.calls == 500


def test_a_tight_budget_waits_for_calls_in_flight_instead_of_giving_up() -> None:
    worst = prompt_bound(question(0).messages) + 16
    with Loopback(latency=0.02) as server:
        budget = Budget(max_tokens=2 * worst + 20 * sum(USED))
        outcomes = [outcome for _, outcome in client(server.url, budget=budget).answers(questions(20))]
    assert all(isinstance(outcome, Answer) for outcome in outcomes)
    assert budget.spent_tokens == 20 * sum(USED)


def test_a_server_that_counts_more_than_the_bound_still_cannot_pass_the_cap() -> None:
    with Loopback(lambda seen: ok("4", (5000, 40))) as server:
        budget = Budget(max_tokens=30_000)
        outcomes = [outcome for _, outcome in client(server.url, budget=budget).answers(questions(20))]
        assert server.spent == budget.spent_tokens <= 30_000
    assert [type(outcome) for outcome in outcomes] == [Answer] * 5 + [Unasked] * 15


def test_unusable_answers_are_paid_for_too() -> None:
    with Loopback([ok("", (40, 2)), ok(None, (40, 0))]) as server:
        budget = Budget()
        list(client(server.url, budget=budget).answers([(0, question(0))]))
    assert budget.spent == Usage(40, 2).plus(Usage(40, 0)).plus(USED)
    assert budget.lost == Usage()


def test_a_call_whose_reply_is_lost_stays_on_the_account() -> None:
    worst = Usage(prompt_bound(question(0).messages), 16)
    with Loopback([HTML, RESET, status(500)]) as server:
        budget = Budget()
        list(client(server.url, budget=budget).answers([(0, question(0))]))
    assert budget.lost == worst.plus(worst)  # the 500 was not billed
    assert budget.spent == USED


def test_missing_usage_is_estimated_and_marked() -> None:
    with Loopback([ok("four", None)]) as server:
        budget = Budget()
        ((_, outcome),) = client(server.url, budget=budget).answers([(0, question(0))])
    assert outcome.estimated
    assert budget.spent == Usage(outcome.prompt_tokens, outcome.completion_tokens) == Usage(55, 1)


def test_prompt_estimates() -> None:
    messages = (("system", "one two three"), ("user", "four five"))
    assert estimate_prompt_tokens(messages, lambda text: len(text.split())) == 5 + 2 * 4 + 3
    assert estimate_prompt_tokens((("user", "a" * 420),)) == 100 + 4 + 3
    assert prompt_bound((("user", "é" * 100),)) >= 200


def test_a_budget_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="prices"):
        Budget(max_cost=5.0)
    with pytest.raises(UsageError, match="--max-tokens"):
        Budget(max_tokens=-1)
    with pytest.raises(UsageError, match="--price-in"):
        Budget(price_in=float("nan"))


# The key, and an endpoint that will not do


REFUSALS = {
    "401": status(401, f"Incorrect API key provided: {KEY}"),
    "403": status(403, f"Bearer {KEY} may not"),
    "model": status(404, "The model `judge` does not exist"),
    "quota": raw({"error": {"code": "insufficient_quota", "message": "pay first"}}, 429),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refused_key_or_model_stops_the_run_at_one_request(refusal: Reply) -> None:
    with Loopback(lambda seen: refusal) as server:
        with pytest.raises(EndpointError) as caught:
            list(client(server.url, concurrency=32).answers(questions(100)))
        assert server.calls == 1
    assert caught.value.exit_code == 8
    shown = f"{caught.value} {caught.value.hint}"
    assert KEY not in shown
    assert "OPENAI_API_KEY" in shown
    assert server.url in shown


def test_the_key_is_sent_and_nowhere_shown(journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notes: list[str] = []

    class Notes(Quiet):
        def note(self, message: str) -> None:
            notes.append(message)

    caplog.set_level("DEBUG")
    with Loopback([status(500, f"{KEY} crashed me"), status(400, f"{'x' * 290} {KEY}")]) as server:
        endpoint = Endpoint(server.url, "judge", concurrency=1)
        pairs = list(ChatClient(endpoint, journal, Budget(), Notes()).answers(questions(3)))
        assert {seen.headers["authorization"] for seen in server.seen} == {f"Bearer {KEY}"}
    assert len(notes) == 1
    everything = f"{pairs} {notes} {caplog.text} {journal.path.read_text()} {endpoint}"
    assert KEY[:6] not in everything


def test_a_local_server_needs_no_key_and_openai_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with Loopback() as server:
        list(client(server.url).answers(questions(1)))
        assert server.seen[0].headers["authorization"] == "Bearer none"
    with pytest.raises(UsageError, match="OPENAI_API_KEY"):
        ChatClient(Endpoint(None, "m"), NoJournal(), Budget(), Quiet())
    monkeypatch.setenv("ORCHARD_KEY", "sk-\u200bcopied")
    with pytest.raises(UsageError, match="ORCHARD_KEY"):
        ChatClient(Endpoint(None, "m", api_key_env="ORCHARD_KEY"), NoJournal(), Budget(), Quiet())
    for address in ("localhost:8000", "ftp://host/v1", "http://", "http://host:port/v1"):
        with pytest.raises(UsageError, match="address"):
            client(address)


def test_redaction() -> None:
    assert redact("key sk-proj-abc_DEF123 was refused") == "key [redacted] was refused"
    assert redact("Authorization: Bearer abc.def-1") == "Authorization: [redacted]"
    assert redact("http://me:pass@host/v1") == "http://[redacted]host/v1"
    assert redact("a plain risk-averse sentence") == "a plain risk-averse sentence"
    assert redact(f"{KEY}!", KEY) == "[redacted]!"


@pytest.mark.parametrize("retries", [0, 6])
def test_an_address_that_takes_no_connection_ends_the_run_at_once(retries: int) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match="cannot be reached") as caught:
            next(client(url, concurrency=4, retries=retries).answers(questions(1)))
    assert "--base-url" in str(caught.value.hint)


def test_an_endpoint_that_is_down_from_the_start_ends_the_run_soon() -> None:
    outcomes = []
    with Loopback(lambda seen: RESET) as server, pytest.raises(EndpointError, match="5 requests in a row") as caught:
        for _, outcome in client(server.url, concurrency=4, retries=1).answers(questions(1000)):
            outcomes.append(outcome)
    assert all(isinstance(outcome, Failure) and outcome.reason == "connection" for outcome in outcomes)
    assert len(outcomes) <= 8
    assert "--base-url" in str(caught.value.hint)


def test_an_endpoint_that_refuses_every_request_ends_the_run_too() -> None:
    with Loopback(lambda seen: status(400, "no such parameter")) as server:
        with pytest.raises(EndpointError, match="no such parameter"):
            list(client(server.url, concurrency=4).answers(questions(1000)))
        assert server.calls <= 12


def test_an_endpoint_that_dies_later_is_given_more_time_and_keeps_what_it_answered(journal: Journal) -> None:
    with Loopback(lambda seen: answer(seen) if seen.number <= 30 else status(502)) as server:
        outcomes = []
        with pytest.raises(EndpointError, match="25 requests in a row"):
            for _, outcome in client(server.url, journal, concurrency=4, retries=0).answers(questions(1000)):
                outcomes.append(outcome)
    assert sum(isinstance(outcome, Answer) for outcome in outcomes) == len(journal) == 30


# Throughput


@pytest.mark.slow
def test_many_in_flight_are_eight_times_as_fast_as_a_barrier_of_five() -> None:
    async def barrier(url: str, requests: list[Request]) -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as api:
            for start in range(0, len(requests), 5):
                calls = [
                    api.chat.completions.create(
                        model="judge",
                        messages=[{"role": role, "content": content} for role, content in request.messages],  # type: ignore[misc]
                        max_tokens=16,
                    )
                    for request in requests[start : start + 5]
                ]
                await asyncio.gather(*calls)

    def ratio() -> float:
        begun = time.perf_counter()
        asyncio.run(barrier(url, [question(number) for number in range(50)]))
        slow = 50 / (time.perf_counter() - begun)
        begun = time.perf_counter()
        list(client(url, concurrency=64).answers(questions(1280)))
        return 1280 / (time.perf_counter() - begun) / slow

    receiver, sender = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(sender,), daemon=True)
    server.start()  # in a process of its own, or it would compete with the client for one interpreter
    url = receiver.recv()
    ratios = []
    while len(ratios) < 3 and max(ratios, default=0.0) < 8.0:
        ratios.append(ratio())
    server.terminate()
    assert max(ratios) >= 8.0, ratios


def _serve(sender: Connection) -> None:
    with Loopback(latency=0.2, keep=False) as server:
        sender.send(server.url)
        threading.Event().wait()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline, "waited 10 s in vain"
        time.sleep(0.01)
