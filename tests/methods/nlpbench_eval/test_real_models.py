"""Real models: the embedded one behind a real server, and a model of this machine in one process and in two."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import warm
from conftest import ROOT, command
from llama import llama_server

QUESTIONS = ROOT / "data/nlpbench/questions.jsonl"
SIX = ["lm-cross-entropy", "cfg-strings", "pmi", "edit-distance", "polysemy", "cnf-steps"]


def run(
    folder: Path, *args: str | Path, launcher: list[str] | None = None, cold: bool = False
) -> tuple[int, dict[str, Any], str]:
    kept = {n: v for n, v in os.environ.items() if not n.lower().endswith("_proxy") and not n.startswith("OPENAI_")}
    line = command("nlpbench-eval", *args)
    if launcher is not None:
        line = [*launcher, *line[1:]]
    done = warm.run(line, timeout=280, cold=cold, cwd=folder, env={**kept, "HF_HUB_OFFLINE": "1"})
    assert launcher is not None or b"Traceback" not in done.stderr, done.stderr.decode()
    return done.returncode, json.loads(done.stdout or b"{}"), done.stderr.decode()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_server_takes_every_strategy_and_repeats_itself(tmp_path: Path) -> None:
    """Spec check 24."""
    (tmp_path / "ids").write_text("\n".join(SIX))
    with llama_server() as address:
        at = [QUESTIONS, "--ids", "ids", "--model", "openai:smollm2", "--base-url", address, "--concurrency", "2"]
        limits = ["--max-tokens", "64", "--thought-tokens", "32", "--judge", "match"]
        for strategy in ("zs", "fs", "cot", "sc", "tot"):
            code, summary, stderr = run(tmp_path, *at, *limits, "--strategy", strategy, "-o", strategy)
            assert code == 0 and summary["answered"] == 6, stderr
            assert set(summary["states"]) <= {"ok", "truncated"}
            print(f"{strategy}: {summary['calls']} calls, lenient {summary['accuracy']['lenient']['value']:.2f}")
        cold = ["--temperature", "0", "--temperature-inner", "0", "--concurrency", "1"]
        for strategy in ("zs", "sc"):
            for name in ("first", "second"):
                run(tmp_path, *at, *limits, *cold, "--strategy", strategy, "-o", f"{strategy}-{name}")
            first, second = (tmp_path / f"{strategy}-{name}/answers.jsonl" for name in ("first", "second"))
            assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_context_that_is_too_long_for_a_real_server_is_told_as_such(tmp_path: Path) -> None:
    long = {"id": "long", "type": "sa", "question": "Which? " + "word " * 3000, "answer": "x", "category": "ot"}
    short = {"id": "short", "type": "sa", "question": "Which?", "answer": "x", "category": "ot"}
    (tmp_path / "d.jsonl").write_text(json.dumps(long) + "\n" + json.dumps(short) + "\n")
    with llama_server(1024) as address:
        at = ["d.jsonl", "--model", "openai:m", "--base-url", address, "--max-tokens", "16", "--judge", "match"]
        code, summary, stderr = run(tmp_path, *at, "-o", "run")
    assert code == 3 and summary["states"]["context_overflow"] == 1, stderr
    states = [json.loads(line)["state"] for line in (tmp_path / "run/answers.jsonl").read_bytes().splitlines()]
    assert states[0] == "context_overflow" and states[1] in ("ok", "truncated")


@pytest.mark.parametrize("strategy", ["fs+sys", "sc", "tot"])
def test_a_local_model_repeats_itself_whatever_is_drawn(strategy: str, tmp_path: Path, tiny_model: Path) -> None:
    options = ["--model", tiny_model, "--max-tokens", "12", "--thought-tokens", "8", "--limit", "8"]
    options += ["--strategy", strategy, "--judge", "match", "--dtype", "float32"]
    for name, cold in (("a/run", True), ("b/run", False)):
        code, _, stderr = run(tmp_path, QUESTIONS, *options, "-o", name, cold=cold)
        assert code in (0, 3), stderr
    first, second = (tmp_path / name / "run" for name in ("a", "b"))
    for file in ("answers.jsonl", "transcripts.jsonl", "journal.jsonl", "report.html", "result.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_two_processes_give_the_bytes_of_one(tmp_path: Path, tiny_model: Path) -> None:
    options = ["--model", tiny_model, "--max-tokens", "12", "--limit", "12", "--dtype", "float32"]
    judge = ["--judge", f"local:{tiny_model}"]  # gives no verdict, and takes part all the same
    alone = run(tmp_path, QUESTIONS, *options, *judge, "-o", "alone/run")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, more in (("both", []), ("both", ["--resume"])):
        code, _, stderr = run(tmp_path, QUESTIONS, *options, *judge, "-o", f"{name}/run", *more, launcher=launcher)
        assert code == 1 and "exitcode  : 3" in stderr, stderr  # the launcher says so in its own way
    assert alone[0] == 3
    for file in ("answers.jsonl", "transcripts.jsonl", "report.md", "result.json"):
        assert (tmp_path / "alone/run" / file).read_bytes() == (tmp_path / "both/run" / file).read_bytes(), file
