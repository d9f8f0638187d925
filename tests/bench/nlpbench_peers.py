"""One exam, one server, three tools that take it: what the nlpbench benches share.

The questions are the synthetic 378 of the tests. Each is asked in one user message (`--history none`), so that all
three tools can send it: `--show-prompts` says how we ask, and the peers are given those texts. Every tool keeps at most
32 requests in flight, asks at temperature 0 for at most 945 tokens, compares the reply with the gold answer and leaves
a record of every question on disk.

ours     `--judge match`: short answers are compared with the accepted form, as the peers do with everything
lm-eval  a `generate_until` task over local JSONL, `exact_match`, samples logged; the data set it converts at its first
         run stays in its cache; the hub is switched off, which it would wait for
inspect  `json_dataset`, `generate()`, `match("exact")`, the `openai-api` provider; no display, no scores while it runs,
         no live view of its log and no control server, none of which a script needs
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loopback import CUT, Loopback, Reply, Seen, ok, raw, status
from methods.nlpbench_eval.examinee import Examinee, gold
from methods.nlpbench_eval.synthetic import synthetic as synthetic

TOOLS = ("ours", "lm-eval", "inspect")
PINNED = ("lm_eval[api]==0.4.13", "inspect_ai==0.3.285", "openai==3.54.0")
CONCURRENCY = 32
MAX_TOKENS = 945
FAULTS: dict[str, Reply] = {
    "null content": replace(ok(None), valid=False),
    "empty choices": raw({"choices": []}),
    "cut JSON": raw(b'{"choices": [{"message": {"role": "assistant", "content": "4'),
    "cut connection": CUT,
    "429, Retry-After 1": status(429, "slow down", "1"),
}
EVERY = 5  # of these replies, or of these questions, one gets the fault

INSPECT_TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import json_dataset
from inspect_ai.scorer import match
from inspect_ai.solver import generate


@task
def exam(questions: str) -> Task:
    return Task(dataset=json_dataset(questions), solver=generate(), scorer=match("exact"))
"""


def peers_in(folder: Path) -> dict[str, str]:
    """Make the peers' environment unless it is there; returns the versions in it."""
    python = folder / "bin/python"
    if not all((folder / "bin" / name).exists() for name in ("lm_eval", "inspect")):
        print(f"installing {', '.join(PINNED)} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, symlinks=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *PINNED], check=True)
    names = [pin.split("==")[0].split("[")[0] for pin in PINNED]
    ask = f"import importlib.metadata as m; print(*(m.version(name) for name in {names}))"
    said = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True, env=plain_environment())
    return dict(zip(names, said.stdout.split(), strict=True))


def plain_environment() -> dict[str, str]:
    """This process's environment without proxies, keys and ways to our own packages."""
    hidden = ("OPENAI_", "INSPECT_", "PYTHONPATH")
    return {n: v for n, v in os.environ.items() if not n.lower().endswith("_proxy") and not n.startswith(hidden)}


@dataclass(frozen=True)
class Exam:
    """Questions on disk, in the form each tool reads.

    Attributes:
        folder: holds data.jsonl (ours), peers.jsonl (id, input, target), lm_eval/exam.yaml and exam.py (inspect).
        records: the questions in our own schema.
    """

    folder: Path
    records: Sequence[dict[str, Any]]

    @classmethod
    def write(cls, folder: Path, records: Sequence[dict[str, Any]]) -> Exam:
        """Lay the files out; the peers' prompts are what our command says it asks."""
        (folder / "lm_eval").mkdir(parents=True)
        # --show-prompts shows how a group begins: here each question is its own.
        alone = [{**r, "group": r["group"] and r["id"], "turn": 0} for r in records]
        _write_lines(folder / "data.jsonl", records)
        _write_lines(folder / "alone.jsonl", alone)
        show = [*OURS, str(folder / "alone.jsonl"), "--strategy", "zs", "--show-prompts"]
        said = subprocess.run(show, check=True, stdout=subprocess.PIPE, text=True, env=_environment("ours", folder))
        asked = {line["id"]: line["messages"] for line in map(json.loads, said.stdout.splitlines())}
        peers = []
        for record in records:
            (message,) = asked[record["id"]]
            assert message["role"] == "user"
            peers.append({"id": record["id"], "input": message["content"], "target": gold(record)})
        _write_lines(folder / "peers.jsonl", peers)
        (folder / "exam.py").write_text(INSPECT_TASK)
        task = {
            "task": "exam",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "peers.jsonl")}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{input}}",
            "doc_to_target": "{{target}}",
            "generation_kwargs": {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": MAX_TOKENS},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / "lm_eval/exam.yaml").write_text(json.dumps(task))  # JSON is YAML
        return cls(folder, records)

    def command(self, tool: str, peers: Path, url: str, output: Path) -> list[str]:
        """The command line with which `tool` takes the exam at `url` and writes to `output`."""
        if tool == "ours":
            ask = ["--model", "openai:examinee", "--base-url", url, "--concurrency", str(CONCURRENCY)]
            how = ["--strategy", "zs", "--history", "none", "--max-tokens", str(MAX_TOKENS), "--judge", "match"]
            return [*OURS, str(self.folder / "data.jsonl"), *ask, *how, "-q", "-o", str(output)]
        if tool == "lm-eval":
            model = {"model": "examinee", "base_url": f"{url}/chat/completions", "num_concurrent": CONCURRENCY}
            given = [
                "--model",
                "local-chat-completions",
                "--model_args",
                ",".join(f"{n}={v}" for n, v in model.items()),
            ]
            task = ["--tasks", "exam", "--include_path", str(self.folder / "lm_eval"), "--apply_chat_template"]
            return [str(peers / "bin/lm_eval"), "run", *given, *task, "--log_samples", "--output_path", str(output)]
        task = ["exam.py", "-T", f"questions={self.folder / 'peers.jsonl'}"]
        ask = ["--model", "openai-api/loopback/examinee", "--model-base-url", url, "--temperature", "0"]
        ask += ["--max-connections", str(CONCURRENCY), "--max-tokens", str(MAX_TOKENS)]
        lean = ["--display", "none", "--no-score-display", "--no-log-realtime", "--ctl-server", "false"]
        return [str(peers / "bin/inspect"), "eval", *task, *ask, *lean, "--log-dir", str(output)]

    def start(self, tool: str, peers: Path, url: str, output: Path) -> subprocess.Popen[bytes]:
        """Start `tool`; what it prints goes to files beside `output`."""
        command = self.command(tool, peers, url, output)
        with Path(f"{output}.out").open("wb") as out, Path(f"{output}.err").open("wb") as err:
            surroundings = _environment(tool, self.folder)
            return subprocess.Popen(command, env=surroundings, cwd=self.folder, stdout=out, stderr=err)


OURS = (sys.executable, "-m", "pomona_cli", "nlpbench-eval")


def _environment(tool: str, folder: Path) -> dict[str, str]:
    if tool == "ours":
        return {**plain_environment(), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    own = {"HF_HOME": folder / "hf", "XDG_DATA_HOME": folder / "share", "XDG_CACHE_HOME": folder / "cache"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**plain_environment(), **{n: str(p) for n, p in own.items()}, **offline, "LOOPBACK_API_KEY": "none"}


@dataclass(frozen=True)
class Cost:
    """What a finished process took: exit code, wall seconds, user and system seconds, peak resident memory in MB."""

    code: int
    wall: float
    cpu: float
    peak_mb: float

    @classmethod
    def of(cls, child: subprocess.Popen[bytes], started: float, limit: float = 600.0) -> Cost:
        """Wait for `child`, which began at `started`, but no longer than `limit` seconds."""
        clock = threading.Timer(limit, child.kill)
        clock.start()
        _, code, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - started
        clock.cancel()
        child.returncode = os.waitstatus_to_exitcode(code)
        return cls(child.returncode, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


@dataclass(frozen=True)
class Marks:
    """What a tool says at the end: its accuracy and how many questions that is over, and its mark for each question."""

    accuracy: float | None = None
    scored: int | None = None
    said: str = ""
    by_id: Mapping[str, bool | None] = field(default_factory=dict)

    @classmethod
    def read(cls, tool: str, peers: Path, output: Path) -> Marks:
        """From the files that `tool` wrote; nothing is known where there are none."""
        return {"ours": _ours, "lm-eval": _lm_eval, "inspect": _inspect}[tool](output, peers)


def _ours(output: Path, _: Path) -> Marks:
    said = Path(f"{output}.out").read_text()
    if not (output / "answers.jsonl").exists():
        return Marks(said="no results")
    summary = json.loads(said.splitlines()[-1])
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    cell = summary["accuracy"]["lenient"]
    states = json.loads((output / "result.json").read_text())["states"]
    told = ", ".join(f"{count} {state}" for state, count in states.items())
    return Marks(cell["value"], cell["n"], told, {a["id"]: a["lenient"]["correct"] for a in answers})


def _lm_eval(output: Path, _: Path) -> Marks:
    found = list(output.rglob("results_*.json"))
    if not found:
        return Marks(said="no results")
    result = json.loads(found[0].read_text())
    (samples,) = output.rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    marks = {line["doc"]["id"]: bool(line["exact_match"]) for line in lines}
    count = result["n-samples"]["exam"]["effective"]
    return Marks(result["results"]["exam"]["exact_match,none"], count, "finished", marks)


def _inspect(output: Path, peers: Path) -> Marks:
    found = list(output.glob("*.eval"))
    if not found:
        return Marks(said="no log")
    dump = [str(peers / "bin/inspect"), "log", "dump", str(found[0])]
    log = json.loads(
        subprocess.run(dump, check=True, stdout=subprocess.PIPE, env=_environment("inspect", output)).stdout
    )
    samples = log.get("samples") or []
    marks: dict[str, bool | None] = {}
    for sample in samples:
        mark = (sample.get("scores") or {}).get("match")
        marks[sample["id"]] = None if mark is None else mark["value"] == "C"
    told = f"status {log['status']}"
    errors = sum(sample.get("error") is not None for sample in samples)
    if errors or log["status"] == "error":
        told += f", {len(samples)} logged, {errors} errors"
    scores = (log.get("results") or {}).get("scores") or []
    if not scores:
        return Marks(None, None, told, marks)
    return Marks(scores[0]["metrics"]["accuracy"]["value"], scores[0]["scored_samples"], told, marks)


@dataclass(frozen=True)
class Seating:
    """What the server saw: requests, most in flight, digests of their message arrays, ids that got a valid answer."""

    calls: int
    peak: int
    messages: tuple[str, ...]
    answered: frozenset[str]


class Examiner:
    """The loopback server in a process of its own; enter it to start."""

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        self._calls = multiprocessing.RawValue("L")
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=_examine, args=(theirs, self._calls, records), daemon=True)

    def __enter__(self) -> Examiner:
        self._process.start()
        self.url: str = self._pipe.recv()
        return self

    def __exit__(self, *exception: object) -> None:
        self._pipe.send(None)
        self._process.join()

    @property
    def calls(self) -> int:
        """Requests so far, while they come."""
        return int(self._calls.value)

    def begin(self, latency: float = 0.0, fault: str | None = None, *, lasting: bool = False) -> None:
        """Start afresh: each reply after `latency` seconds, and every fifth a `fault`.

        A `lasting` fault is the reply to every fifth question, however often it is asked.
        """
        self._pipe.send((latency, fault, lasting))
        self._pipe.recv()

    def end(self) -> Seating:
        """What was seen since."""
        self._pipe.send("end")
        seating: Seating = self._pipe.recv()
        return seating


def _examine(pipe: Connection, calls: Any, records: Sequence[dict[str, Any]]) -> None:
    examinee = Examinee(records)
    numbers = {record["id"]: number for number, record in enumerate(records, start=1)}
    messages: list[str] = []
    answered: set[str] = set()
    fault: str | None = None
    lasting = False

    def script(seen: Seen) -> Reply:
        calls.value += 1
        messages.append(hashlib.sha256(json.dumps(seen.body["messages"]).encode()).hexdigest())
        name = examinee.record(seen.body["messages"][-1]["content"])["id"]
        if fault is not None and (numbers[name] if lasting else seen.number) % EVERY == 0:
            return FAULTS[fault]
        answered.add(name)
        return examinee(seen)

    with Loopback(script, keep=False) as server:
        pipe.send(server.url)
        while (order := pipe.recv()) is not None:
            if order == "end":
                pipe.send(Seating(server.calls, server.peak, tuple(sorted(messages)), frozenset(answered)))
                continue
            server.latency, fault, lasting = order
            server.calls = server.peak = calls.value = 0
            messages.clear()
            answered.clear()
            pipe.send("ready")


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def _write_lines(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
