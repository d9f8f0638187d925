"""Conversations of dependent steps against a real socket, and samples that share a call."""

from __future__ import annotations

import gc
import json
import multiprocessing
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from endpoints import Ear, client, question, surroundings  # noqa: F401
from loopback import HANG, Loopback, Reply, Seen, answer, ok, status
from pomona.errors import DataError, EndpointError
from pomona.io.journal import Journal
from pomona.models import asking
from pomona.models.budget import Budget, CongestionWindow
from pomona.models.chat import Answer, Chain, Failure, Unasked


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "answers.jsonl", {"of": "test"}, resume=False)
    yield opened
    opened.close()


def echo(seen: Seen) -> Reply:
    """The last message in brackets, so that what depends on what can be read off the result."""
    return ok(f"<{seen.body['messages'][-1]['content']}>")


def dialogue(name: str, turns: int) -> Chain[list[str]]:
    """Asks `turns` times, each time about the answer before."""
    said, heard = name, []
    for _ in range(turns):
        (outcome,) = yield [question(said)]
        assert isinstance(outcome, Answer)
        heard.append(outcome.text)
        said = f"{outcome.text}?"
    return heard


def panel(name: str, size: int) -> Chain[list[str]]:
    """Asks several questions at once, then one about all the answers."""
    outcomes = yield [question(f"{name}{number}") for number in range(size)]
    texts = [outcome.text for outcome in outcomes if isinstance(outcome, Answer)]
    (last,) = yield [question("+".join(texts))]
    return [*texts, last.text] if isinstance(last, Answer) else texts


def draw(text: str, count: int, **parameters: Any) -> Chain[list[Any]]:
    """The outcomes of `count` samples of one question."""
    return (yield [question(text, sample=number, **parameters) for number in range(count)])


# Steps


def test_a_step_sees_the_answers_of_the_step_before_in_the_order_of_its_requests() -> None:
    def shuffled(seen: Seen) -> Reply:
        return replace(echo(seen), delay=0.05 * seen.chance("delay"))

    with Loopback(shuffled) as server:
        chains = [*((name, dialogue(name, 3)) for name in "abcde"), *((name, panel(name, 4)) for name in "xyz")]
        results = dict(client(server.url).conversations(chains))
    assert {name: results[name] for name in "abcde"} == {
        name: [f"<{name}>", f"<<{name}>?>", f"<<<{name}>?>?>"] for name in "abcde"
    }
    for name in "xyz":
        texts = [f"<{name}{number}>" for number in range(4)]
        assert results[name] == [*texts, f"<{'+'.join(texts)}>"]


def test_results_come_as_conversations_finish_and_those_without_a_question_too() -> None:
    def silent() -> Chain[str]:
        assert (yield []) == []
        return "nothing asked"

    def mute() -> Chain[str]:
        return "never began"
        yield []

    with Loopback(lambda seen: replace(echo(seen), delay=0.4 if "slow" in seen.text else 0.0)) as server:
        # "probe" goes first and alone
        chains: list[tuple[str, Chain[Any]]] = [("probe", dialogue("p", 1)), ("slow", dialogue("slow", 1))]
        chains += [("quick", dialogue("q", 2)), ("silent", silent()), ("mute", mute())]
        names = [name for name, _ in client(server.url).conversations(chains)]
        assert sorted(names) == ["mute", "probe", "quick", "silent", "slow"]
        assert names[-1] == "slow"
    for concurrency in (1, 3):
        chains = [(str(number), mute()) for number in range(50)]
        assert len(list(client("http://127.0.0.1:9/v1", concurrency=concurrency).conversations(chains))) == 50


def test_conversations_begin_in_order_lazily_and_only_as_many_as_may_be_in_flight() -> None:
    begun: list[int] = []
    live = most = 0

    def chain(number: int) -> Chain[None]:
        nonlocal live, most
        live += 1
        most = max(most, live)
        for step in range(2):
            yield [question(f"{number}.{step}")]
        live -= 1

    def chains() -> Iterator[tuple[int, Chain[None]]]:
        for number in range(400):
            begun.append(number)
            yield number, chain(number)

    with Loopback(latency=0.02) as server:
        talks = client(server.url, concurrency=32).conversations(chains())
        for finished, _ in enumerate(talks, 1):
            assert len(begun) <= finished + 32
        assert (server.calls, server.peak, most) == (800, 32, 32)
    assert begun == list(range(400))


def test_as_many_connections_as_may_be_in_flight_are_opened_and_used_again() -> None:
    with Loopback(latency=0.3) as server:
        talks = client(server.url, concurrency=150).conversations((n, dialogue(str(n), 2)) for n in range(450))
        assert len(list(talks)) == 450
        assert server.peak == 150
        assert server.connections <= 152


def test_closing_cancels_what_is_in_flight_and_closes_the_conversations() -> None:
    closed: list[int] = []

    def chain(number: int) -> Chain[None]:
        try:
            yield [question(str(number))]
        finally:
            closed.append(number)

    with Loopback(lambda seen: answer(seen) if seen.number == 1 else HANG) as server:
        talks = client(server.url, timeout=60).conversations((number, chain(number)) for number in range(50))
        next(talks)
        _until(lambda: server.in_flight == 8)  # another took the place of the one that ended
        begun = time.monotonic()
        talks.close()  # type: ignore[attr-defined]
        assert time.monotonic() - begun < 2.0
        _until(lambda: server.in_flight == 0)
    assert sorted(closed) == list(range(9))
    assert not [thread for thread in threading.enumerate() if thread.name == "chat"]


def test_errors_of_a_conversation_of_their_source_and_of_the_endpoint_are_raised_in_the_caller() -> None:
    def broken() -> Chain[None]:
        yield [question("fine")]
        raise DataError("no such figure")

    def source() -> Iterator[tuple[int, Chain[Any]]]:
        yield 0, dialogue("a", 1)
        raise DataError("torn page")

    with Loopback() as server:
        with pytest.raises(DataError, match="no such figure"):
            list(client(server.url).conversations([(0, broken())]))
        with pytest.raises(DataError, match="torn page"):
            list(client(server.url).conversations(source()))
    with Loopback(lambda seen: status(401, "who are you")) as server:
        with pytest.raises(EndpointError, match="who are you"):
            list(client(server.url).conversations((number, dialogue(str(number), 2)) for number in range(100)))
        assert server.calls == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "chat"]


def test_an_answer_is_in_the_journal_before_its_conversation_sees_it_and_costs_nothing_again(journal: Journal) -> None:
    def chain(text: str, sizes: list[int]) -> Chain[list[str]]:
        heard = []
        for _ in range(2):
            (outcome,) = yield [question(text)]
            assert isinstance(outcome, Answer)
            sizes.append(len(journal))
            assert outcome.text in journal.path.read_text()
            heard.append(text := outcome.text)
        return heard

    with Loopback(echo) as server:
        first = dict(client(server.url, journal).conversations((name, chain(name, [])) for name in "abc"))
        assert (server.calls, len(journal)) == (6, 6)
        free = Budget(max_tokens=0)
        again = dict(client(server.url, journal, free).conversations((name, chain(name, [])) for name in "abc"))
        assert (server.calls, again) == (6, first)


def test_a_conversation_is_told_when_the_budget_is_exhausted_and_when_a_request_failed() -> None:
    def chain(text: str) -> Chain[list[Any]]:
        first = yield [question(f"{text}1")]
        second = yield [question(f"{text}2")]
        return [*first, *second]

    with Loopback(lambda seen: status(400, "no") if seen.text == "b1" else answer(seen)) as server:
        room = Budget(max_tokens=160)
        results = dict(client(server.url, budget=room, concurrency=1).conversations((n, chain(n)) for n in "abcdefgh"))
        assert room.spent_tokens == server.spent <= 160
    assert results["b"][0] == Failure("http 400", 1, "no")
    assert isinstance(results["b"][1], Answer)
    assert results["h"] == [Unasked("budget exhausted")] * 2


def test_the_same_question_in_two_conversations_is_asked_once() -> None:
    with Loopback(echo, latency=0.1) as server:
        chains = [(0, dialogue("alone", 1)), *((number, dialogue("same", 2)) for number in range(1, 6))]
        results = dict(client(server.url).conversations(chains))
        assert server.calls == 3
    assert all(results[number] == ["<same>", "<<same>?>"] for number in range(1, 6))


def test_connections_are_closed_without_a_word(tmp_path: Path) -> None:
    script = """if True:
        import sys
        from endpoints import client
        from loopback import HANG, Loopback, answer
        from test_conversations import dialogue
        with Loopback(lambda seen: answer(seen) if seen.number < 20 else HANG) as server:
            talks = client(server.url).conversations((n, dialogue(str(n), 2)) for n in range(40))
            print(next(talks)[0])
            if sys.argv[1] == "close":
                talks.close()
        """
    path = [*sys.path, str(Path(__file__).parent)]
    for end in ("close", "leave"):
        done = subprocess.run(
            [sys.executable, "-W", "always", "-c", script, end],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": ":".join(filter(None, path)), "PATH": "/usr/bin"},
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_the_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with Loopback(echo) as server:
        monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
        results = dict(client("http://judge.invalid/v1").conversations([(0, dialogue("a", 1))]))
        assert results == {0: ["<a>"]}
        assert server.seen[0].headers["host"] == "judge.invalid"


# Samples


def single(seen: Seen) -> Reply:
    """A server that takes n and gives one choice all the same."""
    return answer(replace(seen, body={**seen.body, "n": 1}))


def refusing(seen: Seen) -> Reply:
    return status(400, "Only one completion choice is allowed") if "n" in seen.body else answer(seen)


@pytest.mark.parametrize(
    ("script", "calls"), [(answer, 159), (single, 477), (refusing, 478)], ids=["honoured", "ignored", "refused"]
)
def test_samples_share_a_call_where_the_server_gives_them(
    script: Callable[[Seen], Reply], calls: int, journal: Journal
) -> None:
    budget = Budget()
    with Loopback(script, latency=0.002) as server:
        asked = client(server.url, journal, budget, concurrency=32)
        results = dict(asked.conversations((number, draw(f"Item {number}", 3)) for number in range(159)))
        assert server.calls == calls
        assert server.peak <= 32
        assert server.spent == budget.spent_tokens
    samples = [answer for number in range(159) for answer in results[number]]
    assert all(isinstance(sample, Answer) and not sample.cached for sample in samples)
    assert sum(sample.prompt_tokens + sample.completion_tokens for sample in samples) == budget.spent_tokens
    assert sum(sample.calls for sample in samples) == server.valid
    assert len(journal) == 477
    assert list(asked.downgrades) == ([] if script is answer else ["n"])


def test_a_server_that_ignores_n_is_found_out_once_though_many_samples_were_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asking, "_PROBE", 0.0)
    ear = Ear()
    with Loopback(single, latency=0.05) as server:
        asked = client(server.url, progress=ear)
        assert len(list(asked.conversations((number, draw(f"Item {number}", 3)) for number in range(20)))) == 20
        assert sum("n" in seen.body for seen in server.seen) == 8
        assert server.calls == 60
    assert len(ear.warnings) == 1


def test_choices_are_dealt_in_order_and_the_first_sample_carries_the_prompt() -> None:
    with Loopback([ok("one", (90, 11), more=["two" * 20, "three"])]) as server:
        (samples,) = dict(client(server.url).conversations([(0, draw("q", 3))])).values()
        assert server.seen[0].body["n"] == 3
    assert [sample.text for sample in samples] == ["one", "two" * 20, "three"]
    assert [(sample.prompt_tokens, sample.calls) for sample in samples] == [(90, 1), (0, 0), (0, 0)]
    assert sum(sample.completion_tokens for sample in samples) == 11
    assert samples[1].completion_tokens == max(sample.completion_tokens for sample in samples)


def test_the_samples_of_a_call_are_journalled_in_one_write(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []
    write = journal._write
    monkeypatch.setattr(journal, "_write", lambda lines: writes.append(lines.count(b"\n")) or write(lines))
    with Loopback() as server:
        list(client(server.url, journal).conversations([(0, draw("a", 3)), (1, draw("b", 2))]))
    assert sorted(writes) == [2, 3]


def test_an_unusable_choice_is_asked_for_again_alone() -> None:
    with Loopback([ok("one", (10, 3), more=["", "three"]), ok("two")]) as server:
        (samples,) = dict(client(server.url).conversations([(0, draw("q", 3))])).values()
        assert server.calls == 2
        assert "n" not in server.seen[1].body
    assert [sample.text for sample in samples] == ["one", "two", "three"]


def test_a_seed_differs_from_sample_to_sample() -> None:
    with Loopback(single) as server:
        list(client(server.url).conversations([(0, draw("q", 3, seed=40))]))
        assert server.seen[0].body["seed"] == 40
        assert sorted(seen.body["seed"] for seen in server.seen[1:]) == [41, 42]
        list(client(server.url).conversations([(0, draw("unseeded", 1))]))
        assert not {"seed", "n", "response_format"} & server.seen[-1].body.keys()


def test_only_the_samples_that_the_journal_lacks_are_asked_for(journal: Journal) -> None:
    with Loopback(echo) as server:
        list(client(server.url, journal).conversations([(0, draw("q", 1, seed=5))]))
    with Loopback() as server:
        (samples,) = dict(client(server.url, journal).conversations([(0, draw("q", 3, seed=5))])).values()
        assert [(seen.body["n"], seen.body["seed"]) for seen in server.seen] == [(2, 6)]
    assert [sample.cached for sample in samples] == [True, False, False]


def test_a_schema_goes_out_as_the_response_format() -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "number"}}}
    with Loopback() as server:
        list(client(server.url).answers([(0, question("q", schema=json.dumps(schema)))]))
        assert server.seen[0].body["response_format"] == {
            "type": "json_schema",
            "json_schema": {"name": "reply", "strict": True, "schema": schema},
        }


# Congestion


def test_a_congestion_window_halves_once_per_episode_and_widens_by_one_per_window() -> None:
    window = CongestionWindow(32)
    sent = [window.episode] * 32
    for episode in sent:
        window.narrow(episode)
    assert window.limit == 16
    window.narrow(window.episode)
    assert window.limit == 8
    for limit in range(8, 32):
        for _ in range(limit):
            assert window.limit == limit
            window.widen()
    for _ in range(100):
        window.widen()
    assert window.limit == 32
    for _ in range(10):
        window.narrow(window.episode)
    assert window.limit == 1


def test_a_server_that_is_overrun_gets_half_as_many_at_a_time() -> None:
    crowd: list[int] = []

    def script(seen: Seen) -> Reply:
        if 1 < seen.number <= 17:  # the first goes alone, the next 16 together
            return status(429, retry_after="0.2")
        if seen.number <= 40:
            crowd.append(server.in_flight)
        return answer(seen)

    with Loopback(script, latency=0.02) as server:
        asked = client(server.url, concurrency=16)
        assert len(list(asked.conversations((number, dialogue(str(number), 1)) for number in range(80)))) == 80
        assert server.peak == 16
    assert 8 <= max(crowd) <= 8 + 2  # wider by one after 8 successes, and again after 9 more
    assert asked.window.episode == 1


# Memory


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_thousand_conversations_take_no_more_memory_than_two_thousand(journal: Journal) -> None:
    def chain(number: int) -> Chain[str]:
        (first,) = yield [question(f"{number} " + "x" * 800)]
        (second,) = yield [question(f"{number} and then? " + "x" * 800)]
        assert isinstance(first, Answer) and isinstance(second, Answer)
        return first.text + second.text

    receiver, sender = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(sender,), daemon=True)
    server.start()
    asked = client(receiver.recv(), journal, concurrency=32, timeout=60.0)
    resident = {}
    begun, busy = time.perf_counter(), time.process_time()
    for done, _ in enumerate(asked.conversations((number, chain(number)) for number in range(20_000)), 1):
        if done in (1_000, 20_000):
            gc.collect()
            resident[done] = _resident()
    wall, busy = time.perf_counter() - begun, time.process_time() - busy
    sender.send("stop")
    server.terminate()
    print(f"{40_000 / wall:,.0f} requests/s, {busy / 40:.2f} ms CPU each, {resident}")
    assert len(journal) == 40_000
    assert resident[20_000] - resident[1_000] < 50 << 20


def _serve(sender: Connection) -> None:
    with Loopback(keep=False) as server:
        sender.send(server.url)
        threading.Event().wait()


def _resident() -> int:
    """Bytes of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline, "waited 10 s in vain"
        time.sleep(0.01)
