"""`alpagasus-filter --judge openai` as a user runs it, against an endpoint that misbehaves: nothing paid for is lost or
paid for twice, every record is accounted for, and the key stays where it was."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import warm
from conftest import command
from loopback import CUT, HANG, HTML, RESET, Loopback, Reply, Seen, answer, ok, raw, status
from specimens import jsonl

CONCURRENCY = 8
KEY = "orchard-KEY_7f3a91c2d4"
RECORDS: list[dict[str, Any]] = [
    {"id": n, "instruction": f"Item {n}: say it in words.", "input": "", "output": f"number {n}", "kept": [n, None]}
    for n in range(150)
]


def judged(url: str, *more: str) -> list[str]:
    endpoint = ["--judge", "openai", "--base-url", url, "--model", "m", "--concurrency", str(CONCURRENCY)]
    return command("alpagasus-filter", "in.jsonl", *endpoint, *more)


def surroundings() -> dict[str, str]:
    """This process's environment with a key and none of its proxies."""
    kept = {n: v for n, v in os.environ.items() if not n.lower().endswith("_proxy") and not n.startswith("OPENAI_")}
    return {**kept, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}


def start(folder: Path, url: str, *more: str, cold: bool = False) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return warm.start(judged(url, *more), cold, cwd=folder, env=surroundings(), stdout=pipe, stderr=pipe)


def run(folder: Path, url: str, *more: str, cold: bool = False) -> tuple[int, dict[str, Any], str]:
    """Exit code, summary and standard error of a run to out.jsonl."""
    process = start(folder, url, "-o", "out.jsonl", *more, cold=cold)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, json.loads(stdout or b"{}"), stderr.decode()


def rated(seen: Seen) -> Reply:
    """A rating fixed by the content, after a wait that shuffles the answers; the reply's `model` is the request's
    digest, so that a journal tells which answers it holds."""
    reply = answer(seen)
    return replace(reply, body=reply.body.replace(b"loopback-1", seen.digest.encode()), delay=seen.chance("") * 0.03)


def number(seen: Seen) -> int:
    """Which record a request is about."""
    found = re.search(r"Item (\d+):", seen.text)
    assert found is not None
    return int(found[1])


def journalled(folder: Path) -> list[str]:
    """The digests of the answers in the journal; what follows the last line break is a torn line, or nothing."""
    path = folder / "out.jsonl.journal"
    lines = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []
    return [json.loads(line)["value"]["model"] for line in lines]


def objects(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in.jsonl").write_bytes(jsonl(RECORDS))
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """The output of an uninterrupted run against `rated`, from a cold start, and the tokens it cost."""
    place = tmp_path_factory.mktemp("whole")
    (place / "in.jsonl").write_bytes(jsonl(RECORDS))
    with Loopback(rated) as server:
        code, summary, stderr = run(place, server.url, cold=True)
        assert (code, summary["in"], server.calls, server.peak) == (0, 150, 150, CONCURRENCY), stderr
        assert sorted(journalled(place)) == sorted(seen.digest for seen in server.seen)
        return (place / "out.jsonl").read_bytes(), server.spent


# --- faults ----------------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[Reply, str]] = {
    "429": (status(429, "slow down", retry_after="1"), "rate limited"),
    "500": (status(500), "http 500"),
    "reset": (RESET, "connection"),
    "hang": (HANG, "timeout"),
    "cut": (CUT, "connection"),
    "html": (HTML, "malformed body"),
    "empty choices": (raw({"choices": []}), "no choices"),
    "null choices": (raw({"choices": None}), "no choices"),
    "null content": (replace(ok(None), valid=False), "empty answer"),
    "error in a 200": (raw({"error": {"message": "overloaded"}}), "error in body"),
}


def test_through_a_storm_of_faults_every_record_is_accounted_for_and_every_answer_kept(folder: Path) -> None:
    fates: dict[tuple[int, int], str] = {}  # (record, attempt) -> fault, or "" for an answer
    paid: set[str] = set()

    def storm(seen: Seen) -> Reply:
        kinds = [*FAULTS] + [""] * len(FAULTS)  # half of all attempts fail
        kind = kinds[int(seen.chance("fault") * len(kinds))]
        fates[number(seen), seen.attempt] = kind
        if kind:
            return FAULTS[kind][0]
        paid.add(seen.digest)
        return rated(seen)

    options = ["--rejects", "bad.jsonl", "--timeout", "1.5", "--retries", "1", "--concurrency", "20"]
    with Loopback(storm) as server:
        code, summary, stderr = run(folder, server.url, *options)
        assert 10 <= server.peak <= 20
        assert server.valid == len(paid)  # every answer went out whole
    assert set(fates.values()) == {*FAULTS, ""}
    last = {n: fates.get((n, 2), fates[n, 1]) for n in range(150)}
    lost = {n: FAULTS[kind][1] for n, kind in last.items() if kind}
    assert lost and (code, summary["rejected"], summary["unanswered"]) == (3, len(lost), len(lost)), stderr
    assert summary["in"] == 150 == summary["out"] + summary["filtered"] + summary["rejected"]
    assert summary["rejected_by"] == Counter(f"unanswered: {reason}" for reason in lost.values())
    set_aside = objects(folder / "bad.jsonl")
    assert {e["record"]["id"]: (e["reason"], e["line"]) for e in set_aside} == {
        n: (f"unanswered: {reason}", n + 1) for n, reason in lost.items()
    }
    assert [e["record"]["id"] for e in set_aside] == sorted(lost)
    score = {number(seen): 1 + int(seen.digest, 16) % 5 for seen in server.seen}
    written = objects(folder / "out.jsonl")
    assert [r["id"] for r in written] == [n for n in range(150) if n not in lost and score[n] == 5]
    assert all({**RECORDS[r["id"]], "alpagasus": r["alpagasus"]} == r and r["alpagasus"]["score"] == 5 for r in written)
    assert len(journalled(folder)) == len(paid) and set(journalled(folder)) == paid
    at = {(number(seen), seen.attempt): seen.at for seen in server.seen}
    waits = [at[n, 2] - at[n, 1] for n in range(150) if fates[n, 1] == "429"]
    assert waits and min(waits) >= 1.0
    assert KEY not in stderr


def test_records_that_never_get_an_answer_are_set_aside_and_asked_about_again_by_resume(
    folder: Path, whole: tuple[bytes, int]
) -> None:
    unlucky, healed = {7, 50, 149}, False

    def script(seen: Seen) -> Reply:
        # even when healed, the first attempt after two in vain fails: faults that pass leave no trace
        failing = number(seen) in unlucky and (not healed or seen.attempt == 3)
        return status(503) if failing else rated(seen)

    with Loopback(script) as server:
        code, summary, stderr = run(folder, server.url, "--retries", "1", "--rejects", "bad.jsonl")
        assert (code, summary["rejected_by"]) == (3, {"unanswered: http 503": 3}), stderr
        assert {(e["record"]["id"], e["reason"]) for e in objects(folder / "bad.jsonl")} == {
            (n, "unanswered: http 503") for n in unlucky
        }
        calls, healed = server.calls, True
        code, summary, stderr = run(folder, server.url, "--retries", "1", "--rejects", "bad.jsonl", "--resume")
        assert (code, summary["rejected"]) == (0, 0), stderr
        assert sorted(number(seen) for seen in server.seen[calls:]) == sorted([*unlucky, *unlucky])
    assert (folder / "out.jsonl").read_bytes() == whole[0]
    assert (folder / "bad.jsonl").read_bytes() == b""


# --- interruptions ---------------------------------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 30) -> None:
    """Until `condition` holds, or `process` has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.001)


def kill_repeatedly(kills: int, each: int, rng: random.Random, folder: Path, expected: bytes) -> None:
    """`kills` kills at random moments, a run being resumed after each and left to finish after every `each` of them."""
    for done in range(0, kills, each):
        for left in (*folder.glob("out.jsonl*"), *folder.glob(".out*")):
            left.unlink()
        with Loopback(rated) as server:
            for kill in range(min(each, kills - done)):
                known, asked = set(journalled(folder)), server.calls
                target = asked + rng.randint(1, max(1, (150 - len(known)) // (each - kill + 1)))
                process = start(folder, server.url, "-o", "out.jsonl", "--resume")
                wait_for(lambda at=target: server.calls >= at, process)
                time.sleep(rng.uniform(0, 0.02))
                process.kill()
                process.communicate()
                assert process.returncode == -signal.SIGKILL  # it had not finished
                again = {seen.digest for seen in server.seen[asked:]} & known
                assert not again
                assert not (folder / "out.jsonl").exists()
            known, asked = set(journalled(folder)), server.calls
            code, _, stderr = run(folder, server.url, "--resume")
            assert code == 0, stderr
            assert not {seen.digest for seen in server.seen[asked:]} & known
            assert server.peak <= 2 * CONCURRENCY  # what a killed run left on the wire may still be there
            assert server.calls <= 150 + CONCURRENCY * min(each, kills - done)
            assert {number(seen) for seen in server.seen} == set(range(150))
        assert (folder / "out.jsonl").read_bytes() == expected
        assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_killed_runs_resume_to_the_same_bytes_without_asking_again(folder: Path, whole: tuple[bytes, int]) -> None:
    kill_repeatedly(3, 3, random.Random(0), folder, whole[0])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_resume_to_the_same_bytes_without_asking_again(folder: Path, whole: tuple[bytes, int]) -> None:
    kill_repeatedly(20, 4, random.Random(1), folder, whole[0])


def test_signals_end_a_run_whose_requests_hang_and_resume_finishes_it(folder: Path, whole: tuple[bytes, int]) -> None:
    answers = 0  # from then on requests hang
    hung: list[Seen] = []

    def script(seen: Seen) -> Reply:
        if server.valid < answers:
            return rated(seen)
        hung.append(seen)
        return HANG

    with Loopback(script) as server:
        for by in (signal.SIGINT, signal.SIGTERM):
            answers += 40
            hung.clear()
            process = start(folder, server.url, "-o", "out.jsonl", "--resume")
            wait_for(lambda: len(hung) == CONCURRENCY, process)  # every answer was taken before the last place hung
            known, asked = set(journalled(folder)), server.calls
            process.send_signal(by)
            sent = time.monotonic()
            stderr = process.communicate(timeout=30)[1].decode()
            assert time.monotonic() - sent < 3
            assert process.returncode == -by
            assert "Traceback" not in stderr
            assert set(journalled(folder)) == known
            assert not (folder / "out.jsonl").exists()
        answers = 1000
        code, _, stderr = run(folder, server.url, "--resume")
        assert code == 0, stderr
        assert server.calls == 150 + 2 * CONCURRENCY
        assert not {seen.digest for seen in server.seen[asked:]} & known
    assert (folder / "out.jsonl").read_bytes() == whole[0]


def test_a_budget_is_kept_and_a_higher_one_finishes_the_run(folder: Path, whole: tuple[bytes, int]) -> None:
    expected, tokens = whole
    third, half, price = tokens // 3, tokens // 2, ["--price-in", "1000", "--price-out", "1000"]
    dearest = 4 * tokens // 150 + 200  # at most this is set aside for one request
    with Loopback(rated) as server:
        code, summary, stderr = run(folder, server.url, "--max-tokens-total", str(third))
        assert (code, summary["stopped"]) == (3, "budget"), stderr
        assert third - dearest < server.spent == sum(summary["spent"].values()) <= third
        assert "--resume" in stderr
        before = server.spent
        cap = (half - third) / 1000  # at 1000 per million tokens
        code, summary, stderr = run(folder, server.url, "--max-cost", str(cap), *price, "--resume")
        assert (code, summary["stopped"]) == (3, "budget"), stderr
        assert cap - dearest / 1000 < summary["spent"]["cost"] == pytest.approx((server.spent - before) / 1000)
        assert server.spent - before <= half - third
        assert {p.name for p in folder.iterdir()} == {"in.jsonl", "out.jsonl.journal"}
        code, summary, stderr = run(folder, server.url, "--max-tokens-total", str(tokens), "--resume")
        assert code == 0, stderr
        assert (server.calls, server.spent) == (150, tokens)
    assert (folder / "out.jsonl").read_bytes() == expected


def test_a_closed_pipe_is_quiet_and_the_journal_serves_the_next_run(folder: Path, whole: tuple[bytes, int]) -> None:
    with Loopback(rated, latency=0.03) as server:
        first = " ".join(f"'{word}'" for word in judged(server.url, "--journal", "out.jsonl.journal"))
        shell = ["bash", "-c", f"{first} | head -1; exit ${{PIPESTATUS[0]}}"]
        ended = subprocess.run(shell, cwd=folder, env=surroundings(), capture_output=True, timeout=60)
        assert (ended.returncode, ended.stderr) == (0, b"")
        assert ended.stdout == whole[0].splitlines(keepends=True)[0]
        known, asked = set(journalled(folder)), server.calls
        assert known and asked < 150
        process = start(folder, server.url, "--journal", "out.jsonl.journal", "--resume")
        stdout = process.communicate(timeout=60)[0]
        assert (process.returncode, stdout) == (0, whole[0])
        assert not {seen.digest for seen in server.seen[asked:]} & known


# --- refusals --------------------------------------------------------------------------------------------------------


def echo(seen: Seen, code: int, indent: int = 0) -> Reply:
    """An error that repeats the request's Authorization header."""
    told = seen.headers["authorization"]
    assert told == f"Bearer {KEY}"
    if indent:
        return raw(b"<html>\n" + b" " * indent + told.removeprefix("Bearer ").encode() + b"</html>", code)
    return status(code, f"Authorization: {told}; api_key={KEY}")


def nowhere(folder: Path, *texts: str) -> None:
    """Fails if the key, or half of it, is in any file or text."""
    for text in texts:
        assert KEY[:10] not in text
    for path in folder.rglob("*"):
        if path.is_file():
            assert KEY[:10].encode() not in path.read_bytes(), path


def test_a_refused_key_ends_the_run_at_one_request_and_is_not_shown(folder: Path) -> None:
    with Loopback(lambda seen: echo(seen, 401)) as server:
        process = start(folder, server.url, "-o", "out.jsonl", "-v", "--debug", "--rejects", "bad.jsonl")
        stdout, stderr = (stream.decode() for stream in process.communicate(timeout=60))
        assert (process.returncode, server.calls) == (8, 1)
    assert "OPENAI_API_KEY" in stderr and "http 401" in stderr
    assert not (folder / "out.jsonl").exists()
    nowhere(folder, stdout, stderr)


def test_the_key_is_nowhere_when_a_server_repeats_it_in_its_errors(folder: Path) -> None:
    cut = 2000 - len("<html>\n") - len(KEY) // 2  # an excerpt of 2,000 bytes would end within the key

    def script(seen: Seen) -> Reply:
        if number(seen) < 4:
            return echo(seen, 500, indent=cut if number(seen) % 2 else 0)
        if number(seen) < 6:
            return replace(echo(seen, 200), status=200)
        return replace(rated(seen), delay=0.05)

    options = ["--rejects", "bad.jsonl", "--report", "report.md", "--retries", "1", "-v", "--debug"]
    with Loopback(script) as server:
        process = start(folder, server.url, "-o", "out.jsonl", *options)
        wait_for(lambda: server.calls > 20, process)
        shown = Path(f"/proc/{process.pid}/cmdline")
        line = shown.read_bytes().decode() if shown.exists() else ""
        stdout, stderr = (stream.decode() for stream in process.communicate(timeout=120))
    assert process.returncode == 3, stderr
    assert json.loads(stdout)["rejected_by"] == {"unanswered: error in body": 2, "unanswered: http 500": 4}
    names = {path.name for path in folder.iterdir()}
    assert {"out.jsonl", "out.jsonl.journal", "out.jsonl.manifest.json", "bad.jsonl", "report.md"} <= names
    assert stderr.count("[redacted]") >= 4
    nowhere(folder, stdout, stderr, line)


def test_a_dead_address_is_told_at_once_be_it_for_one_record(folder: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        started = time.monotonic()
        code, _, stderr = run(folder, f"http://127.0.0.1:{unused.getsockname()[1]}/v1", "--limit", "1")
    assert code == 8, stderr
    assert time.monotonic() - started < 10
    assert "hint: check --base-url" in stderr and "Traceback" not in stderr
    assert not (folder / "out.jsonl").exists()
