"""Whole runs, in process: rated from files, by a scripted endpoint, by a local model."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loopback import Loopback, Reply, Seen, answer, mixed, ok, status
from pomona.errors import CheckFailed, DataError, EndpointError, UsageError
from pomona.io.conversation import Turn
from pomona.io.stream import Stream, StreamOptions
from pomona.methods.alpagasus_filter.config import Config
from pomona.methods.alpagasus_filter.judges import expected_score, label_tokens, whole_points
from pomona.methods.alpagasus_filter.prompts import open_prompt
from pomona.methods.alpagasus_filter.run import run
from pomona.runtime.progress import Quiet
from pomona.runtime.settings import Settings

KEY = "sk-not-a-real-key-0123456789"


def _records(count: int) -> list[dict[str, Any]]:
    return [
        {"id": n, "instruction": f"Say {n} in words.", "input": "", "output": f"That is {n}.", "extra": [n, None]}
        for n in range(count)
    ]


class Watching(Quiet):
    """Progress whose words are kept."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def show(self, lines: str) -> None:
        self.shown.append(lines)

    def warn(self, message: str) -> None:
        self.shown.append(message)

    def note(self, message: str) -> None:
        self.shown.append(message)


@dataclass
class Result:
    kept: list[dict[str, Any]]
    rejects: list[dict[str, Any]]
    summary: dict[str, Any]
    said: list[str]
    stopped: str | None

    @property
    def reasons(self) -> dict[str, int]:
        found: dict[str, int] = self.summary.get("rejected_by", {})
        return found


@dataclass
class Bench:
    """A folder with an input, and the command on it."""

    folder: Path

    def put(self, name: str, value: Any) -> Path:
        path = self.folder / name
        path.write_text(json.dumps(value))
        return path

    def __call__(
        self, records: Sequence[dict[str, Any]], config: Config, *, rejects: bool = True, **settings: Any
    ) -> Result:
        source = self.put("data.json", list(records))
        aside = self.folder / "rejects.jsonl" if rejects else None
        output = self.folder / "kept.jsonl" if settings.pop("to_file", True) else None
        shared = Settings(output=output, **settings)
        stdout, progress = io.BytesIO(), Watching()
        stream = Stream(
            "alpagasus-filter",
            (str(source),),
            StreamOptions(rejects=aside),
            shared,
            stdout=stdout,
            progress=progress,
            own_key="alpagasus",
            described={"config": config},
        )
        with stream:
            extra = run(config, shared, stream)
        written = output.read_bytes() if output is not None and output.exists() else stdout.getvalue()
        return Result(
            [json.loads(line) for line in written.splitlines()],
            [json.loads(line) for line in aside.read_bytes().splitlines()] if aside and aside.exists() else [],
            {**stream.counts.summary(), **extra},
            progress.shown,
            stream.stopped,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def _ids(records: Sequence[dict[str, Any]]) -> list[int]:
    return [record["id"] for record in records]


# --- ratings that exist -----------------------------------------------------------------------------------------------


def test_records_pass_whole_in_order_with_one_key_more(bench: Bench) -> None:
    records = _records(6)
    ratings = bench.put("r.json", [{**r, "score": s} for r, s in zip(records, (5, 4, 4.5, 0, 4.4, 4.5), strict=True)])
    result = bench(records, Config(ratings=ratings))
    assert _ids(result.kept) == [0, 2, 5]
    assert [{k: v for k, v in r.items() if k != "alpagasus"} for r in result.kept] == [records[i] for i in (0, 2, 5)]
    assert result.kept[1]["alpagasus"] == {
        "score": 4.5,
        "dimension": "accuracy",
        "model": None,
        "first_line": None,
        "status": "ok",
        "tokens": None,
    }
    assert result.summary["filtered_by"] == {"below threshold": 3}
    assert result.summary["ratings"] == {"in": 6, "used": 6}


def test_what_has_no_rating_is_rejected_and_never_filtered(bench: Bench) -> None:
    records = _records(4)
    ratings = bench.put("r.json", [{**records[0], "score": 5}, {**records[1], "score": -1}, {**records[2], "score": 1}])
    result = bench(records, Config(ratings=ratings))
    assert _ids(result.kept) == [0]
    assert result.reasons == {"unparsed": 1, "no rating": 1}
    assert [(r["reason"], r["record"]["alpagasus"]["score"]) for r in result.rejects] == [
        ("unparsed", None),
        ("no rating", None),
    ]
    counted = result.summary
    assert counted["in"] == counted["out"] + counted["filtered"] + counted["rejected"]


@pytest.mark.parametrize(("policy", "kept"), [("keep", [0, 1]), ("drop", [0]), ("retry", [0])])
def test_unparsed_ratings_go_where_the_policy_says(bench: Bench, policy: Any, kept: list[int]) -> None:
    records = _records(2)
    ratings = bench.put("r.json", [5, None])
    assert _ids(bench(records, Config(ratings=ratings, join="index", on_unparsed=policy)).kept) == kept


def test_unparsed_ratings_can_end_the_run(bench: Bench) -> None:
    with pytest.raises(CheckFailed, match="no rating in the reply"):
        bench(_records(2), Config(ratings=bench.put("r.json", [5, None]), join="index", on_unparsed="fail"))
    assert not (bench.folder / "kept.jsonl").exists()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("to_file", [True, False])
def test_nothing_comes_out_when_positions_cannot_be_trusted(bench: Bench, count: int, to_file: bool) -> None:
    stdout_before = len(list(bench.folder.iterdir()))
    with pytest.raises(DataError, match=rf"{count} ratings for 3 records"):
        bench(_records(3), Config(ratings=bench.put("r.json", [5] * count), join="index"), to_file=to_file)
    assert not (bench.folder / "kept.jsonl").exists() and stdout_before == 0


def test_a_limit_reads_a_prefix_of_ratings_by_position(bench: Bench) -> None:
    result = bench(_records(5), Config(ratings=bench.put("r.json", [5, 5, 1, 5, 5]), join="index"), limit=3)
    assert _ids(result.kept) == [0, 1]


def test_a_bad_record_keeps_its_position(bench: Bench) -> None:
    records = _records(3)
    del records[1]["output"]
    result = bench(records, Config(ratings=bench.put("r.json", [5, 5, 4]), join="index"))
    assert _ids(result.kept) == [0]
    assert result.reasons == {'field "output" is missing (use --output-field)': 1}


def test_strictness_and_threshold(bench: Bench) -> None:
    records, ratings = _records(3), bench.put("r.json", [4, 3.5, 3])
    assert _ids(bench(records, Config(ratings=ratings, join="index", threshold=3.5)).kept) == [0, 1]
    (bench.folder / "kept.jsonl").unlink()
    (bench.folder / "rejects.jsonl").unlink()
    assert _ids(bench(records, Config(ratings=ratings, join="index", threshold=3.5, strict_gt=True)).kept) == [0]


@pytest.mark.parametrize(("top", "kept"), [("3", [1, 2, 4]), ("40%", [1, 2]), ("0", []), ("9", [0, 1, 2, 3, 4])])
def test_top_keeps_the_best_in_source_order_whatever_the_threshold(bench: Bench, top: str, kept: list[int]) -> None:
    result = bench(_records(5), Config(ratings=bench.put("r.json", [1, 4, 3, 2, 3]), join="index", top=top))
    assert _ids(result.kept) == kept
    assert result.summary["filtered"] == 5 - len(kept)


def test_balance_keeps_a_floor_of_each_group(bench: Bench) -> None:
    records = [{**record, "kind": "ab"[n % 2]} for n, record in enumerate(_records(8))]
    ratings = bench.put("r.json", [5, 1, 5, 4, 5, 3, 5, 2])
    result = bench(records, Config(ratings=ratings, join="index", balance="kind=50%"))
    assert _ids(result.kept) == [0, 2, 3, 4, 5, 6]
    assert result.summary["balanced"] == 2


def test_balance_by_coding_keeps_coding_records(bench: Bench) -> None:
    records = _records(4)
    records[1]["output"] = "In Python: print(1)"
    ratings = bench.put("r.json", [5, 2, 5, 1])
    config = Config(ratings=ratings, join="index", balance="@coding=1", keyword_report=True)
    result = bench(records, config)
    assert _ids(result.kept) == [0, 1, 2]
    assert result.summary["keywords"]["after"]["any_keyword"] == 1
    assert any("any keyword" in shown for shown in result.said)


def test_a_histogram_and_a_report_are_made_on_request(bench: Bench) -> None:
    ratings = bench.put("r.json", [5, 4, 4, -1])
    config = Config(ratings=ratings, join="index", histogram=True, report=bench.folder / "r.md")
    result = bench(_records(4), config)
    assert result.summary["histogram"] == {"4": 2, "5": 1}
    assert any("<- threshold" in shown for shown in result.said)
    text = (bench.folder / "r.md").read_text()
    assert "| in | 4 |" in text and "| dropped: below threshold | 2 |" in text and "| dropped: unparsed | 1 |" in text


def test_random_9k_by_membership_keeps_935_in_any_rating_order(bench: Bench, shared: Callable[[str], Path]) -> None:
    """D2 and D7 through the whole command."""
    data = json.loads(shared("data/alpaca/random_9k.json").read_text())
    claude = {json.dumps(r, sort_keys=True) for r in json.loads(shared("data/alpaca/claude_t45.json").read_text())}
    rated = [{**r, "score": 5 if json.dumps(r, sort_keys=True) in claude else 4} for r in data]
    result = bench(data, Config(ratings=bench.put("r.json", rated[::-1])))
    assert result.summary["out"] == 935 and result.summary["filtered"] == 8294
    assert [{k: r[k] for k in ("instruction", "input", "output")} for r in result.kept] == [
        {k: r[k] for k in ("instruction", "input", "output")} for r in rated if r["score"] == 5
    ]


def test_ratings_from_a_file_import_neither_torch_nor_an_api_client(tmp_path: Path) -> None:
    script = (
        "import sys, pomona.methods.alpagasus_filter.run as m; from pomona.methods.alpagasus_filter.ratings import *;"
        "print([n for n in ('torch', 'transformers', 'openai', 'matplotlib') if n in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == "[]"


# --- an endpoint ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("POMONA_TEST_KEY", KEY)
    monkeypatch.setattr("pomona.models.asking.BACKOFF_BASE", 0.001)
    yield


def _judge(server: Loopback, **more: Any) -> Config:
    given: dict[str, Any] = {"judge": "openai", "base_url": server.url, "api_key_env": "POMONA_TEST_KEY"}
    return Config(**{**given, "threshold": 4.0, **more})


def _rate(text: str, **more: Any) -> Callable[[Seen], Reply]:
    return lambda seen: ok(text, (100, 3), **more)


def test_each_record_is_asked_about_once_and_comes_out_in_order(bench: Bench) -> None:
    records = _records(40)
    with Loopback(latency=0.005) as server:
        result = bench(records, _judge(server, concurrency=8, threshold=0.0), model="judge-1")
        assert server.calls == 40 and server.peak <= 8
        body = server.seen[0].body
    assert _ids(result.kept) == list(range(40))
    first = result.kept[0]["alpagasus"]
    assert (first["status"], first["model"]) == ("ok", "loopback-1")
    assert first["first_line"] == str(int(first["score"]))
    assert set(first["tokens"]) == {"prompt", "completion"}
    assert body["model"] == "judge-1" and body["temperature"] == 0 and body["max_tokens"] == 8
    assert "stop" not in body and body["messages"][1]["content"].startswith("###Instruction:\n")
    assert result.summary["spent"]["prompt_tokens"] > 0


def test_an_explanation_is_asked_for_with_the_paper_s_length(bench: Bench) -> None:
    with Loopback(_rate("4.5\n\nThe answer is right.")) as server:
        result = bench(_records(1), _judge(server, explain=True), model="m")
        assert server.seen[0].body["max_tokens"] == 256
    assert result.kept[0]["alpagasus"]["first_line"] == "4.5"


def test_identical_records_are_asked_about_once(bench: Bench) -> None:
    records = [{**_records(3)[n % 3], "id": n} for n in range(60)]
    with Loopback(latency=0.01) as server:
        result = bench(records, _judge(server, threshold=0.0), model="m", to_file=False)
        assert server.calls == 3
    assert _ids(result.kept) == list(range(60))
    assert len({json.dumps(r["alpagasus"]) for r in result.kept[::3]}) == 1


def test_another_threshold_or_parser_reads_the_journal_without_a_call(bench: Bench) -> None:
    with Loopback(_rate("Score: 4.5")) as server:
        first = bench(_records(10), _judge(server, threshold=5.0), model="m")
        assert (server.calls, len(first.kept)) == (10, 0)
        (bench.folder / "kept.jsonl").unlink()
        second = bench(_records(10), _judge(server, threshold=4.0), model="m", resume=True)
        assert (server.calls, len(second.kept)) == (10, 10)
        (bench.folder / "kept.jsonl").unlink()
        third = bench(_records(10), _judge(server, parser="reference"), model="m", resume=True)
        assert server.calls == 10 and third.reasons == {"unparsed": 10}


def test_a_score_cut_at_the_token_limit_is_not_believed(bench: Bench) -> None:
    with Loopback(_rate("The score is 4", finish_reason="length")) as server:
        assert bench(_records(1), _judge(server), model="m").reasons == {"unparsed": 1}


def test_retry_asks_once_more_in_the_same_conversation(bench: Bench) -> None:
    def script(seen: Seen) -> Reply:
        return ok("5" if len(seen.body["messages"]) == 4 else "Good answer!", (50, 2))

    with Loopback(script, latency=0.002) as server:
        result = bench(_records(30), _judge(server, on_unparsed="retry", concurrency=4), model="m")
        assert server.calls == 60
        again = next(s for s in server.seen if len(s.body["messages"]) == 4).body["messages"]
    assert again[2] == {"role": "assistant", "content": "Good answer!"}
    assert _ids(result.kept) == list(range(30))
    assert result.kept[0]["alpagasus"]["tokens"] == {"prompt": 100, "completion": 4}


def test_faults_leave_every_record_scored_or_rejected_and_no_answer_lost(bench: Bench) -> None:
    """D8."""
    script = mixed(rate_limited=0.10, server_error=0.05, malformed=0.02)
    with Loopback(script, latency=0.002) as server:
        result = bench(_records(500), _judge(server, concurrency=16, threshold=0.0), model="m")
        assert server.peak <= 16
        counted = result.summary
        assert counted["in"] == 500 == counted["out"] + counted["filtered"] + counted["rejected"]
        answers = sum(r["alpagasus"]["status"] == "ok" for r in result.kept)
        assert answers == server.valid
    assert _ids(result.kept) == sorted(_ids(result.kept))


def test_what_stays_unanswered_is_rejected_with_its_reason_and_asked_again_on_resume(bench: Bench) -> None:
    def script(seen: Seen) -> Reply:
        return status(500) if "Say 3 " in seen.text else ok("5", (10, 1))

    with Loopback(script) as server:
        result = bench(_records(6), _judge(server, retries=1), model="m")
        assert server.calls == 7
    assert _ids(result.kept) == [0, 1, 2, 4, 5]
    assert result.summary["unanswered"] == 1
    assert [r["reason"] for r in result.rejects] == ["unanswered: http 500"]
    with Loopback(_rate("5")) as server:
        (bench.folder / "kept.jsonl").unlink()
        again = bench(_records(6), _judge(server), model="m", resume=True)
        assert server.calls == 1 and len(again.kept) == 6


def test_a_spent_budget_stops_cleanly_publishes_nothing_and_resumes(bench: Bench) -> None:
    """D9."""
    with Loopback(latency=0.001) as server:
        whole = bench(_records(200), _judge(server, threshold=0.0), model="m")
        expected, cost = (bench.folder / "kept.jsonl").read_bytes(), server.spent
        calls = server.calls
    assert calls == 200 and len(whole.kept) == 200
    for path in list(bench.folder.glob("kept*")):
        path.unlink()
    with Loopback(latency=0.001) as server:
        capped = _judge(server, threshold=0.0, price_in=1e6, price_out=1e6, max_cost=cost / 2, concurrency=4)
        result = bench(_records(200), capped, model="m", overwrite=True)
        assert server.spent <= cost / 2 and 0 < server.calls < 200
        assert result.stopped is not None and result.summary["stopped"] == "budget"
        assert result.summary["unanswered"] == 200 - server.calls
        assert not (bench.folder / "kept.jsonl").exists()
        second = bench(_records(200), _judge(server, threshold=0.0), model="m", resume=True)
        assert server.calls == 200 and len(second.kept) == 200
    assert (bench.folder / "kept.jsonl").read_bytes() == expected


def test_a_budget_spent_before_the_choice_chooses_nothing(bench: Bench) -> None:
    with Loopback() as server:
        result = bench(
            _records(50), _judge(server, max_tokens_total=4000, top="5", concurrency=2), model="m", to_file=False
        )
        assert 0 < server.calls < 50
    assert result.kept == [] and result.summary["in"] == 50 == result.summary["filtered"] + result.summary["rejected"]


def test_a_refused_key_ends_the_run(bench: Bench) -> None:
    with Loopback(lambda seen: status(401, f"Incorrect API key provided: {KEY}")) as server:
        with pytest.raises(EndpointError) as error:
            bench(_records(5), _judge(server), model="m")
        assert KEY not in str(error.value) + str(error.value.hint)


def test_the_key_is_sent_and_written_nowhere(bench: Bench) -> None:
    """D12, within the process."""
    with Loopback(mixed(server_error=0.3)) as server:
        result = bench(_records(20), _judge(server, report=bench.folder / "r.md"), model="m")
        assert server.seen[0].headers["authorization"] == f"Bearer {KEY}"
    files = [path for path in bench.folder.rglob("*") if path.is_file()]
    assert any(path.name.endswith(".journal") for path in files)
    assert not any(KEY.encode() in path.read_bytes() for path in files)
    assert KEY not in json.dumps([result.summary, result.said])


def test_a_dry_run_asks_nothing_and_its_estimate_is_within_3_percent_of_usage(bench: Bench) -> None:
    """D10, with a server that counts as no tokenizer here does: the journal of a few answers corrects the estimate."""

    def script(seen: Seen) -> Reply:
        return ok("4", (round(len(seen.text) / 3.1) + 11, 2))

    records = [{**r, "output": r["output"] * (1 + n % 17)} for n, r in enumerate(_records(400))]
    with Loopback(script) as server:
        config = _judge(server, price_in=2.0, price_out=4.0)
        plain = bench(records, config, model="m", dry_run=True).summary
        assert server.calls == 0 and plain["records"] == plain["requests"] == 400
        assert plain["tokens_from"] == "characters" and plain["completion_tokens"] == 400 * 8
        bench(records, config, model="m", limit=40)
        assert server.calls == 40
        corrected = bench(records, config, model="m", dry_run=True, resume=True).summary
        assert server.calls == 40 and corrected["requests"] == 360 and corrected["answered"] == 40
        before = server.spent
        for path in bench.folder.glob("kept.jsonl*"):
            if not path.name.endswith("journal"):
                path.unlink()
        result = bench(records, config, model="m", resume=True).summary
        assert server.calls == 400
        spent = result["spent"]
        assert sum((spent["prompt_tokens"], spent["completion_tokens"])) == server.spent - before
    assert abs(corrected["prompt_tokens"] / spent["prompt_tokens"] - 1) < 0.03
    assert corrected["completion_tokens"] == spent["completion_tokens"]
    assert abs(corrected["cost"] / spent["cost"] - 1) < 0.03
    assert corrected["seconds"] > 0


def test_a_dry_run_counts_what_is_asked_not_what_is_read(bench: Bench) -> None:
    with Loopback() as server:
        plan = bench([*_records(5), *_records(5)], _judge(server, rpm=10), model="m", dry_run=True).summary
    assert (plan["records"], plan["requests"], plan["cost"], plan["seconds"]) == (10, 5, None, 30.0)


# --- a local model ----------------------------------------------------------------------------------------------------


def _local(**more: Any) -> Config:
    return Config(judge="local", **{"threshold": 0.0, **more})


def _reference(model_folder: Path, records: Sequence[dict[str, Any]]) -> list[float]:
    """Expected scores one record at a time, from the whole vocabulary's probabilities in float64."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    scores = []
    for record in records:
        chat = [
            {"role": role, "content": content}
            for role, content in open_prompt("repo", dimension="accuracy", low=0, high=5).messages(
                [Turn(record["instruction"], record["input"], record["output"])]
            )
        ]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            logits = model(input_ids=ids["input_ids"]).logits[0, -1].double().numpy()
        p = np.exp(logits - logits.max())
        labels = p[[tokenizer.encode(str(s), add_special_tokens=False)[0] for s in range(6)]]
        scores.append(float(labels @ np.arange(6) / labels.sum()))
    return scores


def test_the_expected_score_is_the_renormalised_mean_over_the_points(bench: Bench, tiny_model: Path) -> None:
    records = [{**r, "output": r["output"] * (1 + n % 3)} for n, r in enumerate(_records(5))]
    result = bench(records, _local(), model=str(tiny_model), dtype="float32", device="cpu")
    scores = [record["alpagasus"]["score"] for record in result.kept]
    assert scores == pytest.approx(_reference(tiny_model, records), abs=1e-3)
    assert len(set(scores)) > 1 and all(record["alpagasus"]["first_line"] is None for record in result.kept)


@pytest.mark.parametrize("score", ["expected", "greedy"])
def test_a_resumed_local_run_ends_with_the_same_bytes(bench: Bench, tiny_model: Path, score: Any) -> None:
    records = [{**_records(200)[n % 190], "id": n} for n in range(200)]
    config = _local(score=score, on_unparsed="keep")
    given: dict[str, Any] = {"model": str(tiny_model), "dtype": "float32", "device": "cpu"}
    bench(records, config, **given)
    kept, journal = bench.folder / "kept.jsonl", bench.folder / "kept.jsonl.journal"
    whole = kept.read_bytes()
    assert len(whole.splitlines()) == 200 and not journal.exists()
    kept.unlink()
    other = Config(judge="local", score=score, on_unparsed="fail", threshold=0.0)
    poisoned = [*records[:150], {"id": 150, "instruction": "no output"}, *records[151:]]
    with pytest.raises((DataError, CheckFailed)):
        bench(poisoned, other, rejects=False, overwrite=True, **given)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:41]) + lines[41][:20])
    (bench.folder / "rejects.jsonl").unlink()
    bench(records, config, resume=True, **given)
    assert kept.read_bytes() == whole


def test_a_batch_size_changes_no_score(bench: Bench, tiny_model: Path) -> None:
    given: dict[str, Any] = {"model": str(tiny_model), "dtype": "float32", "device": "cpu", "to_file": False}
    one = bench(_records(20), _local(), batch_size=1, **given)
    (bench.folder / "rejects.jsonl").unlink()
    many = bench(_records(20), _local(), **given)
    a, b = ([r["alpagasus"]["score"] for r in result.kept] for result in (one, many))
    assert a == pytest.approx(b, abs=2e-4)


def test_a_record_longer_than_the_context_is_rejected_as_such(bench: Bench, tiny_model: Path) -> None:
    records = _records(3)
    records[1]["output"] = "x" * 5000
    result = bench(records, _local(), model=str(tiny_model), device="cpu")
    assert _ids(result.kept) == [0, 2] and result.reasons == {"too long": 1}
    assert "unanswered" not in result.summary


def test_a_local_dry_run_counts_tokens_with_the_model_s_tokenizer(bench: Bench, tiny_model: Path) -> None:
    plan = bench(_records(4), _local(), model=str(tiny_model), dry_run=True).summary
    asked = bench(_records(4), _local(), model=str(tiny_model), device="cpu").kept
    assert plan["tokens_from"] == "tokenizer"
    assert plan["prompt_tokens"] == sum(record["alpagasus"]["tokens"]["prompt"] for record in asked)


def test_a_dry_run_with_the_judge_s_tokenizer_is_exact(bench: Bench, tiny_model: Path) -> None:
    """D10 for a server that serves a model whose directory is here."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def script(seen: Seen) -> Reply:
        ids = tokenizer.apply_chat_template(seen.body["messages"], add_generation_prompt=True, return_dict=False)
        return ok("5", (len(ids), 1))

    with Loopback(script) as server:
        plan = bench(_records(50), _judge(server), model=str(tiny_model), dry_run=True).summary
        assert server.calls == 0 and plan["tokens_from"] == "tokenizer"
        spent = bench(_records(50), _judge(server), model=str(tiny_model)).summary["spent"]
    assert plan["prompt_tokens"] == spent["prompt_tokens"]


def test_labels_of_several_tokens_are_told_apart_after_what_they_share() -> None:
    assert label_tokens([[9, 1], [9, 2], [9, 3]]) == ((9,), [1, 2, 3])
    assert label_tokens([[1], [2]]) == ((), [1, 2])
    assert label_tokens([[7, 8, 1, 4], [7, 8, 2]]) == ((7, 8), [1, 2])
    for encoded in ([[1], [1, 0]], [[1, 2], [1, 2]], [[1, 5], [2, 5], [1, 6]]):
        with pytest.raises(UsageError, match="apart by one token"):
            label_tokens(encoded)


def test_the_points_of_a_scale_are_its_whole_numbers() -> None:
    assert whole_points(0, 5) == [0, 1, 2, 3, 4, 5]
    assert whole_points(0.5, 3.5) == [1, 2, 3]
    assert whole_points(-1, 1) == [-1, 0, 1]
    with pytest.raises(UsageError, match="two whole points"):
        whole_points(0.2, 1.5)


def test_an_expected_score_is_worked_by_hand() -> None:
    import numpy as np

    p = np.array([[0.1, 0.3], [0.0, 1e-30]])
    with np.errstate(divide="ignore"):
        assert expected_score(np.log(p), [2, 4]) == pytest.approx([(0.1 * 2 + 0.3 * 4) / 0.4, 4.0])


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "exactly one of --ratings and --judge"),
        ({"ratings": Path("r"), "judge": "local"}, "exactly one"),
        ({"judge": "local", "threshold": 5.5}, "off the scale"),
        ({"judge": "local", "scale": "5:0"}, "LOW:HIGH"),
        ({"judge": "local", "scale": "a:b"}, "LOW:HIGH"),
        ({"judge": "openai", "max_cost": 1.0}, "--max-cost needs prices"),
        ({"judge": "openai", "score": "greedy"}, "--judge local"),
        ({"judge": "openai", "concurrency": 0}, "--concurrency must be positive"),
        ({"judge": "local", "top": "x"}, "--top x"),
        ({"judge": "local", "balance": "x"}, "--balance x"),
        ({"judge": "local", "dimension": " "}, "--dimension is empty"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Config(**options)


def test_an_endpoint_needs_the_judge_s_name(bench: Bench) -> None:
    with Loopback(answer) as server, pytest.raises(UsageError, match="--judge openai needs --model"):
        bench(_records(1), _judge(server))
