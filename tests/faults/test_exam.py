"""`nlpbench-eval` as a user runs it, against an endpoint and a machine that misbehave: no failure becomes a wrong
answer, no answer is paid for twice, and a run that was cut down goes on to the same end."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import warm
from conftest import command
from loopback import CUT, HANG, HTML, RESET, Loopback, Reply, Seen, ok, raw, status
from methods.nlpbench_eval.examinee import Examinee, but
from methods.nlpbench_eval.synthetic import synthetic, write

RECORDS = synthetic()
KEY = "orchard-KEY_7f3a91c2d4"
JUDGE = ["--judge", "match"]


def surroundings() -> dict[str, str]:
    """This process's environment with a key and none of its proxies."""
    kept = {n: v for n, v in os.environ.items() if not n.lower().endswith("_proxy") and not n.startswith("OPENAI_")}
    return {**kept, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}


def exam(url: str, *more: str) -> list[str]:
    return command("nlpbench-eval", "d.jsonl", "--model", "openai:m", "--base-url", url, "-o", "run", *more)


def start(folder: Path, url: str, *more: str, cold: bool = False) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return warm.start(exam(url, *more), cold, cwd=folder, env=surroundings(), stdout=pipe, stderr=pipe)


def run(folder: Path, url: str, *more: str, cold: bool = False) -> tuple[int, dict[str, Any], str]:
    """Exit code, summary and standard error."""
    process = start(folder, url, *more, cold=cold)
    stdout, stderr = process.communicate(timeout=200)
    assert b"Traceback" not in stderr, stderr.decode()
    return process.returncode, json.loads(stdout or b"{}"), stderr.decode()


def answers(folder: Path) -> bytes:
    return (folder / "run/answers.jsonl").read_bytes()


def journalled(folder: Path) -> int:
    """Answers in the journal; what follows the last line break is a torn line."""
    path = folder / "run.journal"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Until `condition` holds, or `process` has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "d.jsonl", RECORDS)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The answers of a run without a fault, from a cold start."""
    place = tmp_path_factory.mktemp("whole")
    write(place / "d.jsonl", RECORDS)
    with Loopback(Examinee(RECORDS), latency=0.02) as server:
        code, summary, stderr = run(place, server.url, *JUDGE, cold=True)
        assert (code, server.calls, server.peak) == (0, 378, 32), stderr
        assert summary["accuracy"]["strict"]["value"] == 1.0
    return answers(place)


# --- what an endpoint does -------------------------------------------------------------------------------------------


def test_waiting_as_told_every_answer_comes(folder: Path, whole: bytes) -> None:
    """Spec check 15: every fifth reply is a 429 that asks for a second."""
    refused: dict[str, float] = {}

    def busy(seen: Seen) -> Reply | None:
        if seen.digest in refused:
            assert seen.at - refused.pop(seen.digest) >= 1.0
        if seen.number % 5 == 0 and seen.attempt == 1:
            refused[seen.digest] = seen.at
            return status(429, "slow down", retry_after="1")
        return None

    with Loopback(but(Examinee(RECORDS), busy)) as server:
        code, summary, stderr = run(folder, server.url, *JUDGE)
    assert code == 0 and not refused and set(summary["states"]) == {"ok"}, stderr
    assert answers(folder) == whole


def test_a_wait_that_is_too_long_ends_the_run_and_tells_until_when(folder: Path) -> None:
    with Loopback(lambda seen: status(429, "daily limit", retry_after="3600")) as server:
        started = time.monotonic()
        code, _, stderr = run(folder, server.url, "--max-wait", "60")
        assert time.monotonic() - started < 5
    assert code == 8 and re.search(r"\d\d:\d\d", stderr) and "--resume" in stderr, stderr
    assert not (folder / "run").exists()


COCKTAIL = [status(500), RESET, HANG, CUT, HTML, raw({"choices": []}), raw({"choices": None}), raw({"error": "busy"})]


def test_a_cocktail_of_faults_changes_no_answer(folder: Path, whole: bytes) -> None:
    """Spec check 16: eight kinds of fault, each on 3 % of the attempts."""
    met = []

    def mixed(seen: Seen) -> Reply | None:
        draw = int(seen.chance("fault") / 0.03)
        if draw < len(COCKTAIL):
            met.append(draw)
            return COCKTAIL[draw]
        return None

    with Loopback(but(Examinee(RECORDS), mixed)) as server:
        code, _, stderr = run(folder, server.url, *JUDGE, "--timeout", "2")
        assert server.peak <= 32
    assert set(met) == set(range(len(COCKTAIL))) and len(met) > 50
    assert code == 0 and answers(folder) == whole, stderr
    assert len(json.loads((folder / "run/result.json").read_bytes())["states"]) == 1


def test_what_stays_broken_is_unanswered_under_its_own_name_and_resume_asks_for_it_alone(
    folder: Path, whole: bytes
) -> None:
    kinds = {
        "q001": (status(500), "exhausted"),
        "q002": (HANG, "timeout"),
        "q003": (HTML, "bad_response"),
        "q004": (status(400, "no"), "http_4xx"),
        "q005": (status(400, "This model's maximum context length is 4096 tokens"), "context_overflow"),
        "q006": (replace(ok(""), valid=False), "empty"),
    }
    sits = Examinee(RECORDS)

    def broken(seen: Seen) -> Reply | None:
        name = sits.record(seen.text)["id"]
        return kinds[name][0] if name in kinds else None

    with Loopback(but(sits, broken)) as server:
        code, summary, stderr = run(folder, server.url, *JUDGE, "--retries", "1", "--timeout", "1")
        assert code == 3 and summary["answered"] == 372 and summary["accuracy"]["lenient"]["value"] == 1.0, stderr
    states = {a["id"]: a["state"] for a in map(json.loads, answers(folder).splitlines())}
    assert {name: states[name] for name in kinds} == {name: state for name, (_, state) in kinds.items()}
    with Loopback(sits) as server:
        code, _, stderr = run(folder, server.url, *JUDGE, "--retries", "1", "--timeout", "1", "--resume")
        assert (code, server.calls) == (0, 6), stderr
    assert answers(folder) == whole


def test_a_parameter_that_is_refused_is_left_out_for_the_rest_of_the_run(folder: Path, whole: bytes) -> None:
    def particular(seen: Seen) -> Reply | None:
        if "max_tokens" in seen.body:
            return status(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return status(400, "'temperature' does not support 0.0") if "temperature" in seen.body else None

    with Loopback(but(Examinee(RECORDS), particular)) as server:
        code, _, stderr = run(folder, server.url, *JUDGE)
        assert code == 0 and server.calls < 378 + 2 * 32 + 2, stderr
    assert answers(folder) == whole
    downgrades = json.loads((folder / "run/result.json").read_bytes())["downgrades"]
    assert set(downgrades) == {"max_tokens", "temperature"}
    code, _, stderr = run(folder, server.url, "--judge", "human", "--resume")  # the server is gone
    assert json.loads((folder / "run/result.json").read_bytes())["downgrades"] == downgrades, stderr


def test_a_dead_or_forbidden_endpoint_is_told_at_once(folder: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        started = time.monotonic()
        code, _, stderr = run(folder, f"http://127.0.0.1:{unused.getsockname()[1]}/v1")
        assert (code, "check --base-url" in stderr) == (8, True) and time.monotonic() - started < 6, stderr
    with Loopback(lambda seen: status(401, f"bad key {KEY}")) as server:
        code, _, stderr = run(folder, server.url, "--resume")
        assert (code, server.calls) == (8, 1) and KEY not in stderr, stderr
    assert not (folder / "run").exists()


def test_a_budget_is_kept_and_a_larger_one_finishes_the_run(folder: Path, whole: bytes) -> None:
    """Spec check 19."""
    prices = ["--price-in", "10", "--price-out", "10", "--max-tokens", "50"]
    _, plan, _ = run(folder, "http://127.0.0.1:1/v1", *prices, "-n")
    cost = plan["cost"]
    with Loopback(Examinee(RECORDS)) as server:
        code, summary, stderr = run(folder, server.url, *JUDGE, *prices, "--max-cost", str(cost / 2))
        assert code == 3 and summary["stopped"] == "budget" and "--resume" in stderr, stderr
        assert 0 < server.calls < 378 and server.spent * 10 / 1e6 <= cost / 2
        assert not (folder / "run").exists()
        asked = server.calls
        code, _, stderr = run(folder, server.url, *JUDGE, *prices, "--max-cost", str(10 * cost), "--resume")
        assert (code, server.calls) == (0, 378), (stderr, asked)
    assert answers(folder) == whole


# --- what a machine does ---------------------------------------------------------------------------------------------


def kill_and_resume(kills: int, folder: Path, expected: bytes) -> tuple[int, int]:
    """Kill runs at random moments, resuming after each; returns the kills that found one going, and the calls made."""
    rng = random.Random(kills)
    hit = calls = 0
    while hit < kills:
        for left in (folder / "run").glob("*"):
            left.unlink()
        if (folder / "run").exists():
            (folder / "run").rmdir()
        with Loopback(Examinee(RECORDS), latency=0.05) as server:
            here = 0
            for _ in range(4):
                process = start(folder, server.url, *JUDGE, "--resume")
                before = server.calls
                target = before + rng.randint(1, 120)
                wait_for(lambda at=target: server.calls >= at, process)
                time.sleep(rng.uniform(0, 0.06))
                process.kill()
                process.communicate()
                if process.returncode == -signal.SIGKILL:
                    here += 1
                    if here % 2 and (folder / "run.journal").exists():
                        with (folder / "run.journal").open("ab") as journal:
                            journal.write(b'{"key": "torn')
            code, _, stderr = run(folder, server.url, *JUDGE, "--resume")
            assert code == 0, stderr
            assert answers(folder) == expected
            assert 378 <= server.calls <= 378 + 32 * here
            assert {p.name for p in folder.iterdir()} == {"d.jsonl", "run"}
            hit, calls = hit + here, calls + server.calls
    return hit, calls


def test_killed_runs_resume_to_the_same_answers(folder: Path, whole: bytes) -> None:
    assert kill_and_resume(4, folder, whole)[0] >= 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_resume_to_the_same_answers(folder: Path, whole: bytes) -> None:
    """Spec check 17."""
    hit, calls = kill_and_resume(20, folder, whole)
    print(f"nlpbench-eval: {hit} kills found the run going; {calls} calls")


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A disk of 300 kB; skips where none can be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_ends_the_run_in_one_line_and_resume_works_once_there_is_room(
    small_disk: Path, whole: bytes
) -> None:
    """Spec check 18."""
    write(small_disk / "d.jsonl", RECORDS)
    (small_disk / "ballast").write_bytes(b"x" * 60_000)
    with Loopback(Examinee(RECORDS)) as server:
        code, _, stderr = run(small_disk, server.url, *JUDGE)
        assert code == 6 and "no space left on the device" in stderr and not (small_disk / "run").exists(), stderr
        assert len([line for line in stderr.splitlines() if "error:" in line]) == 1
        for line in (small_disk / "run.journal").read_bytes().split(b"\n")[:-1]:
            json.loads(line)
        (small_disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=30m", small_disk], check=True)
        calls = server.calls
        code, _, stderr = run(small_disk, server.url, *JUDGE, "--resume")
        assert code == 0 and server.calls <= 378 + 33, (stderr, calls)
    assert answers(small_disk) == whole


def test_two_runs_do_not_share_a_directory(folder: Path) -> None:
    """Spec check 20, first half."""
    with Loopback(Examinee(RECORDS), latency=0.2) as server:
        first = start(folder, server.url, *JUDGE)
        wait_for(lambda: server.calls > 0, first)
        code, _, stderr = run(folder, server.url, *JUDGE, "--resume")
        assert code == 6 and str(first.pid) in stderr, stderr
        assert first.communicate(timeout=60)[0] and first.returncode == 0
        assert server.calls == 378


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_what_the_run_dies_by_and_resume_finishes_it(number: int, folder: Path, whole: bytes) -> None:
    with Loopback(Examinee(RECORDS), latency=0.1) as server:
        process = start(folder, server.url, *JUDGE)
        wait_for(lambda: journalled(folder) > 40, process)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == -number and b"Traceback" not in stderr
        assert not (folder / "run").exists()
        code, _, told = run(folder, server.url, *JUDGE, "--resume")
        assert code == 0 and server.calls <= 378 + 32, told
    assert answers(folder) == whole


# --- what a model says -----------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "\x1b]0;owned\x07\x1b[2J\x1b[31mred",
    "\u202egnorw \u200b\ufeff",
    "| a | b |\n|---|---|\n[x](javascript:alert(1)) `${jndi:ldap://x}`",
    "x" * 300_000,
    "half a pair \\ud83c",
    '{"verdict": "correct"}',
    "=HYPERLINK(1)",
]


def test_hostile_replies_are_shown_as_text_everywhere(folder: Path) -> None:
    def hostile(seen: Seen) -> Reply:
        reply = ok(HOSTILE[int(seen.digest, 16) % len(HOSTILE)])
        return replace(reply, body=reply.body.replace(b"\\\\ud83c", b"\\ud83c"))

    with Loopback(hostile) as server:
        code, summary, stderr = run(folder, server.url, "--judge", "human", "--limit", "60", "--retries", "1")
    assert code in (0, 3) and summary["accuracy"]["lenient"]["value"] is not None, stderr
    assert "\x1b" not in stderr
    page = (folder / "run/report.html").read_text()
    assert "<script>alert" not in page and "<img" not in page and "\u202e" not in page
    markdown = (folder / "run/report.md").read_text()
    assert "\x1b" not in markdown and "<script>" not in markdown and "](javascript:" not in markdown


def test_the_key_is_nowhere(folder: Path) -> None:
    def echo(seen: Seen) -> Reply | None:
        if seen.number % 7 == 0:
            return status(400, f"Authorization: {seen.headers['authorization']}; key={KEY}")
        return None

    with Loopback(but(Examinee(RECORDS), echo)) as server:
        process = start(folder, server.url, "-v", "--debug", *JUDGE)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 3
    texts = [stdout, stderr, *(path.read_bytes() for path in folder.rglob("*") if path.is_file())]
    assert not [text for text in texts if KEY[:10].encode() in text]
