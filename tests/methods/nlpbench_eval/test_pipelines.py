"""In pipes and Makefiles, and on machines that lack the heavy packages."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from conftest import command
from loopback import Loopback
from methods.nlpbench_eval.examinee import Examinee
from methods.nlpbench_eval.synthetic import synthetic, write

RECORDS = synthetic()
POMONA = " ".join(f"'{word}'" for word in command("nlpbench-eval"))


def shell(line: str, folder: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    kept = {n: v for n, v in os.environ.items() if not n.lower().endswith("_proxy") and not n.startswith("OPENAI_")}
    words = ["bash", "-o", "pipefail", "-c", line]
    return subprocess.run(
        words, cwd=folder, env={**kept, **env}, capture_output=True, timeout=120, stdin=subprocess.DEVNULL
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "d.jsonl", RECORDS)
    return tmp_path


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "openai", "accelerate", "scipy", "matplotlib"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Absent())
"""


def test_planning_scoring_comparing_and_the_oracle_need_no_heavy_package(folder: Path) -> None:
    """Spec check 23."""
    with Loopback(Examinee(RECORDS)) as server:
        at = f"d.jsonl --model openai:m --base-url {server.url}"
        assert shell(f"{POMONA} {at} -o a", folder).returncode == 0
        (folder / "without").mkdir()
        (folder / "without/sitecustomize.py").write_text(WITHOUT)
        without = {"PYTHONPATH": f"{folder / 'without'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        for line in (
            f"{POMONA} --help",
            f"{POMONA} {at} --expect-official -n",
            f"{POMONA} {at} --show-prompts | head -1",
            f"{POMONA} {at} -o a --resume --judge match",  # the answers are scored anew
            f"{POMONA} d.jsonl --model mock:oracle -o b",
            f"{POMONA} --compare a b -o c",
        ):
            done = shell(line, folder, **without)
            assert done.returncode == 0, (line, done.stderr.decode())
        assert server.calls == 378
        done = shell(f"{POMONA} {at} -o d", folder, **without)
        assert done.returncode != 0 and b"openai is not installed" in done.stderr


def test_a_summary_goes_down_a_pipe_and_the_rest_to_standard_error(folder: Path) -> None:
    """Spec check 27."""
    read = 'python3 -c \'import json, sys; print(json.load(sys.stdin)["accuracy"]["strict"]["value"])\''
    done = shell(f"{POMONA} d.jsonl --model mock:oracle -o run | cat | {read}", folder)
    assert (done.returncode, done.stdout) == (0, b"1.0\n") and b"All questions" in done.stderr
    done = shell(f"cat d.jsonl | {POMONA} - --model mock:oracle -o other -q", folder)
    assert done.returncode == 0 and json.loads(done.stdout)["questions"] == 378 and done.stderr == b""
    done = shell(f"{POMONA} d.jsonl --show-prompts | head -1; echo ${{PIPESTATUS[0]}}", folder)
    assert done.stdout.splitlines()[-1] == b"0" and done.stderr == b""


def test_make_rebuilds_a_run_only_when_its_data_changed(folder: Path) -> None:
    """Spec check 27."""
    (folder / "Makefile").write_text(
        "both: zs/result.json cot/result.json\n"
        f"\t{POMONA} --compare zs cot -o both --overwrite\n"
        "%/result.json: d.jsonl\n"
        f"\t{POMONA} $< --model mock:oracle --strategy $* -o $* --overwrite -q\n"
    )
    assert shell("make both", folder).returncode == 0
    stamps = [(folder / name / "result.json").stat().st_mtime_ns for name in ("zs", "cot", "both")]
    assert b"up to date" in shell("make both", folder).stdout
    assert [(folder / name / "result.json").stat().st_mtime_ns for name in ("zs", "cot", "both")] == stamps
    os.utime(folder / "d.jsonl")
    assert shell("make both", folder).returncode == 0
    assert all((folder / n / "result.json").stat().st_mtime_ns > s for n, s in zip(("zs", "cot"), stamps, strict=False))


def test_a_run_of_no_answer_at_all_is_told_and_not_scored(folder: Path) -> None:
    from dataclasses import replace

    from loopback import ok

    with Loopback(lambda seen: replace(ok(None, finish_reason="length"), valid=False)) as server:
        done = shell(f"{POMONA} d.jsonl --model openai:m --base-url {server.url} -o run --limit 40", folder)
    summary = json.loads(done.stdout)
    assert (done.returncode, summary["answered"], summary["accuracy"]["lenient"]["value"]) == (3, 0, None)
    assert b"--max-tokens" in done.stderr and b"NaN" not in (folder / "run/result.json").read_bytes()
