"""The real command against a loopback server and the oracle: what is asked, written, reported and exited with."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import warm
from conftest import command
from loopback import Loopback, Reply, Seen, ok
from methods.nlpbench_eval.examinee import Examinee, but
from methods.nlpbench_eval.synthetic import CONTEXT, official, synthetic, write

RECORDS = synthetic()
EMPTY = replace(ok(None, finish_reason="length"), valid=False)
SHORT = [r for r in RECORDS if r["group"] is None][:20]


def surroundings() -> dict[str, str]:
    """This process's environment without its proxies and keys."""
    kept = {n: v for n, v in os.environ.items() if not n.lower().endswith("_proxy") and not n.startswith("OPENAI_")}
    return {**kept, "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run the command on d.jsonl; returns exit code, summary and standard error."""
    write(tmp_path / "d.jsonl", RECORDS)

    def go(*args: str | Path, data: str = "d.jsonl", cold: bool = False) -> tuple[int, dict[str, Any], str]:
        done = warm.run(command("nlpbench-eval", data, *args), cold=cold, cwd=tmp_path, env=surroundings())
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return done.returncode, json.loads(done.stdout or b"{}"), done.stderr.decode()

    return go


def at(server: Loopback) -> list[str]:
    return ["--model", "openai:m", "--base-url", server.url]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# --- the oracle, and the shape of a run ------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["zs", "fs+cot+sys", "cot+sc", "tot"])
def test_the_oracle_is_right_about_everything(strategy: str, ask: Any, tmp_path: Path) -> None:
    code, summary, stderr = ask("--model", "mock:oracle", "--strategy", strategy, "-o", "run")
    assert (code, summary["questions"], summary["answered"]) == (0, 378, 378), stderr
    for parser in ("strict", "lenient"):
        assert (summary["accuracy"][parser]["value"], summary["accuracy"][parser]["n"]) == (1.0, 378)
    assert summary["run"] == "run" and set(summary["states"]) == {"ok"}
    names = {path.name for path in (tmp_path / "run").iterdir()}
    wanted = {"answers.jsonl", "transcripts.jsonl", "journal.jsonl", "result.json", "report.md", "report.html"}
    assert names == {*wanted, "manifest.json"}
    assert [a["id"] for a in lines(tmp_path / "run/answers.jsonl")] == [r["id"] for r in RECORDS]
    assert {p.name for p in tmp_path.iterdir()} == {"d.jsonl", "run"}


def test_official_files_are_read_as_they_are_and_their_counts_can_be_held_to(ask: Any, tmp_path: Path) -> None:
    """Spec check 1."""
    names = [path.name for path in official(tmp_path)]
    code, plan, stderr = ask(names[1], "--expect-official", "--dry-run", data=names[0])
    assert code == 0, stderr
    assert (plan["questions"], plan["types"]["sa"], plan["context"]["without"]) == (378, 192, 209)
    write(tmp_path / "d.jsonl", [r for r in RECORDS if r["id"] != RECORDS[-1]["id"]])
    code, _, stderr = ask("--expect-official", "--dry-run")
    assert code == 4 and "questions all: 377, expected 378" in stderr


def test_every_problem_of_the_data_is_in_the_message(ask: Any, tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", [{**RECORDS[0], "answer": [99]}, {**RECORDS[1], "category": "x"}])
    code, _, stderr = ask("--dry-run")
    assert code == 4 and "d.jsonl:1: answer" in stderr and "d.jsonl:2: category" in stderr


def test_what_is_sent_can_be_seen_beforehand(ask: Any, tmp_path: Path) -> None:
    done = warm.run(command("nlpbench-eval", "d.jsonl", "--show-prompts", "--strategy", "fs"), cwd=tmp_path)
    shown = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(shown) == len({r["group"] or r["id"] for r in RECORDS})
    with Loopback(Examinee(RECORDS)) as server:
        assert ask(*at(server), "--strategy", "fs", "-o", "run", "--judge", "match")[0] == 0
        sent = [json.dumps(s.body["messages"]) for s in server.seen]
    assert {json.dumps(entry["messages"]) for entry in shown} <= set(sent)


# --- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "several", "options", "calls"),
    [
        ("zs", True, [], 378),
        ("cot", True, [], 570),
        ("sc", True, [], 378),
        ("sc", False, [], 696),
        ("tot", True, ["--profile", "released", "--context", "without"], 1463),
    ],
)
def test_the_server_counts_the_calls_that_the_plan_promised(
    strategy: str, several: bool, options: list[str], calls: int, ask: Any
) -> None:
    """Spec check 11."""
    with Loopback(Examinee(RECORDS, several=several)) as server:
        arguments = [*at(server), "--strategy", strategy, *options]
        plan = ask(*arguments, "-n")[1]
        assert server.calls == 0
        code, summary, stderr = ask(*arguments, "-o", "run")
        assert server.calls == calls == summary["calls"] == plan["calls" if several else "calls_without_n"], stderr
        assert server.peak <= 32
    assert code == 0


def test_a_context_group_is_asked_as_one_conversation(ask: Any, tmp_path: Path) -> None:
    """Spec check 12, over the wire."""
    group = [r for r in RECORDS if r["group"] == "g03"]
    (tmp_path / "ids").write_text("\n".join(r["id"] for r in group))
    for history, roles in (("own", ["user", "assistant"] * 4 + ["user"]), ("none", ["user"])):
        with Loopback(Examinee(RECORDS)) as server:
            assert ask(*at(server), "--ids", "ids", "--history", history, "-o", history)[0] == 0
            messages = server.seen[-1].body["messages"]
        assert [m["role"] for m in messages] == roles
        assert sum(group[0]["context"] in m["content"] for m in messages) == 1


def test_the_longest_conversations_begin_first(ask: Any, tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", [*SHORT, *RECORDS[:20]])
    with Loopback(Examinee(RECORDS), latency=0.05) as server:
        assert ask(*at(server), "--concurrency", "4", "-o", "run")[0] == 0
        first = server.seen[:4]
    assert all("The questions that follow are about this" in seen.text for seen in first)


def test_the_plan_knows_what_a_judge_will_be_asked(ask: Any) -> None:
    with Loopback(Examinee(RECORDS)) as server:
        arguments = [*at(server), "--judge", "openai:judge"]
        plan = ask(*arguments, "-n")[1]
        code, _, stderr = ask(*arguments, "-o", "run")
        assert code == 0 and server.calls == plan["calls"] + plan["judge_calls"] == 378 + 192, stderr


def test_accuracy_is_what_the_model_knows(ask: Any) -> None:
    """Spec check 13: right on every third question, with a judge that tells the truth."""
    known = {r["id"] for r in RECORDS[::3]}
    with Loopback(Examinee(RECORDS, known)) as server:
        code, summary, stderr = ask(*at(server), "--judge", "openai:judge", "-o", "run")
    assert code == 0, stderr
    for parser in ("strict", "lenient"):
        assert summary["accuracy"][parser]["value"] == pytest.approx(126 / 378)
        low, high = summary["accuracy"][parser]["ci"]
        assert low < 1 / 3 < high


# --- faults are not mistakes -----------------------------------------------------------------------------------------


def test_an_empty_reply_is_not_a_wrong_answer(ask: Any, tmp_path: Path) -> None:
    """Spec check 14: null content for every fifth of twenty; the peers print 0.8 and exit 0."""
    write(tmp_path / "d.jsonl", SHORT)
    script = but(Examinee(SHORT), lambda seen: EMPTY if seen.number % 5 == 0 else None)
    with Loopback(script) as server:
        code, summary, stderr = ask(*at(server), "--judge", "match", "-o", "run")
        assert server.calls == 20
        assert code == 3 and summary["states"] == {"empty": 4, "ok": 16}, stderr
        assert summary["accuracy"]["strict"] == summary["accuracy"]["lenient"]
        assert (summary["accuracy"]["strict"]["value"], summary["accuracy"]["strict"]["n"]) == (1.0, 16)
        result = json.loads((tmp_path / "run/result.json").read_bytes())
        assert result["accuracy"]["strict"]["all"]["value"] == 0.8
        assert "Empty replies (finish reason length): 4. Raise --max-tokens." in stderr
        code, summary, stderr = ask(*at(server), "--judge", "match", "--missing", "wrong", "-o", "other")
        assert summary["accuracy"]["strict"]["value"] == 0.8
    with Loopback(Examinee(SHORT)) as server:
        code, summary, stderr = ask(*at(server), "--judge", "match", "-o", "run", "--resume")
        assert (code, server.calls, summary["answered"]) == (0, 4, 20), stderr


def test_replies_that_were_cut_or_refused_are_scored_and_filtered_ones_are_not(ask: Any, tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", SHORT[:4])
    kinds = {0: "length", 1: "content_filter"}

    def finish(seen: Seen) -> Reply | None:
        place = next(i for i, r in enumerate(SHORT) if r["question"] in seen.text)
        if place == 2:
            message = {"role": "assistant", "content": None, "refusal": "I will not."}
            return ok("", message=message)
        return ok(Examinee(SHORT).say(seen.text), finish_reason=kinds[place]) if place in kinds else None

    with Loopback(but(Examinee(SHORT), finish)) as server:
        code, summary, stderr = ask(*at(server), "--judge", "match", "-o", "run")
    assert summary["states"] == {"filtered": 1, "ok": 1, "refused": 1, "truncated": 1}, stderr
    answers = lines(tmp_path / "run/answers.jsonl")
    assert [a["lenient"]["correct"] for a in answers] == [True, None, False, True] and code == 3


def test_without_a_judge_short_answers_are_neither_right_nor_wrong(ask: Any, tmp_path: Path) -> None:
    with Loopback(Examinee(RECORDS)) as server:
        code, summary, stderr = ask(*at(server), "-o", "run")
    assert code == 0 and summary["accuracy"]["lenient"]["n"] == 378 - 192 and "--judge" in stderr
    result = json.loads((tmp_path / "run/result.json").read_bytes())
    assert result["unscored"] == {"unjudged": 192} and result["accuracy"]["strict"]["all"]["n"] == 378 - 192


def test_a_judge_that_talks_is_asked_again_and_then_given_up(ask: Any, tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", [r for r in SHORT if r["type"] == "sa"][:4])
    seen_by: Counter[str] = Counter()

    def prose(seen: Seen) -> Reply | None:
        if "Student's answer" not in seen.text:
            return None
        student = seen.text.split("Student's answer: ")[1].split("\n")[0]
        seen_by[student] += 1
        if seen_by[student] < (3 if student.endswith("1") else 9):
            return ok("It seems fine to me.")
        return ok('```json\n{"reason": "yes", "verdict": "correct"}\n```')

    with Loopback(but(Examinee(SHORT), prose)) as server:
        code, summary, stderr = ask(*at(server), "--judge", "openai:judge", "-o", "run")
        asked = [s for s in server.seen if "Student's answer" in s.text]
        assert {len(s.body["messages"]) for s in asked} == {2, 4}
        assert all(("response_format" in s.body) == (len(s.body["messages"]) == 4) for s in asked)
    judged = {a["gold"][0]: a["judgement"]["status"] for a in lines(tmp_path / "run/answers.jsonl")}
    assert code == 3, stderr
    assert all(status == ("ok" if name.endswith("1") else "judge_error") for name, status in judged.items())
    assert summary["accuracy"]["lenient"]["n"] == sum(status == "ok" for status in judged.values())


def test_people_can_be_the_judge_by_way_of_a_spreadsheet(ask: Any, tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", SHORT)
    short = [r["id"] for r in SHORT if r["type"] == "sa"]
    hostile = but(Examinee(SHORT), lambda seen: ok("=cmd()") if "What is the name" in seen.text else None)
    with Loopback(hostile) as server:
        code, _, stderr = ask(*at(server), "--judge", "human", "-o", "run")
        assert code == 3, stderr
        rows = list(csv.DictReader((tmp_path / "run/verdicts.csv").open()))
        assert [row["id"] for row in rows] == short and {row["verdict"] for row in rows} == {""}
        assert {row["answer"] for row in rows} == {"'=cmd()"}
        with (tmp_path / "run/verdicts.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({**row, "verdict": "yes" if place % 2 else "0"} for place, row in enumerate(rows))
        calls = server.calls
        again = ["--judge", "human", "--verdicts", "run/verdicts.csv", "-o", "run", "--resume"]
        code, summary, stderr = ask(*at(server), *again)
        assert (code, server.calls) == (0, calls), stderr
    assert summary["accuracy"]["lenient"]["n"] == 20
    answers = {a["id"]: a["lenient"]["correct"] for a in lines(tmp_path / "run/answers.jsonl")}
    assert [answers[name] for name in short] == [bool(place % 2) for place in range(len(short))]
    kept = list(csv.DictReader((tmp_path / "run/verdicts.csv").open()))
    assert [row["verdict"] for row in kept] == [str(place % 2) for place in range(len(short))]


def test_people_and_judge_together_tell_how_far_the_judge_can_be_trusted(ask: Any, tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", RECORDS)
    short = [r["id"] for r in RECORDS if r["type"] == "sa"][:40]
    known = {r["id"] for r in RECORDS[::2]}
    rows = [f"{name},{int((name in known) != (place < 4))}" for place, name in enumerate(short)]
    (tmp_path / "v.csv").write_text("id,verdict\n" + "\n".join(rows) + "\n")
    with Loopback(Examinee(RECORDS, known)) as server:
        code, _, stderr = ask(*at(server), "--judge", "openai:j", "--verdicts", "v.csv", "-o", "run")
    assert code == 0, stderr
    judge = json.loads((tmp_path / "run/result.json").read_bytes())["judge"]
    assert (judge["n"], judge["agreement"]) == (40, 0.9) and 0.7 < judge["kappa"] < 0.9


# --- going on, and building on ---------------------------------------------------------------------------------------


def test_a_finished_run_is_scored_anew_without_asking_again(ask: Any, tmp_path: Path) -> None:
    with Loopback(Examinee(RECORDS)) as server:
        assert ask(*at(server), "-o", "run")[0] == 0
        first = (tmp_path / "run/answers.jsonl").read_bytes()
        code, summary, stderr = ask(*at(server), "-o", "run", "--resume")
        assert (code, server.calls) == (0, 378) and "finished already" in stderr
        code, summary, stderr = ask(*at(server), "-o", "run", "--resume", "--judge", "match", "--parser", "strict")
        assert (code, server.calls, summary["accuracy"]["strict"]["n"]) == (0, 378, 378), stderr
        assert ask(*at(server), "-o", "run", "--resume")[0] == 0
        assert (server.calls, (tmp_path / "run/answers.jsonl").read_bytes()) == (378, first)


def test_other_questions_or_settings_are_not_mixed_into_a_run(ask: Any, tmp_path: Path) -> None:
    """Spec check 20, second half."""
    with Loopback(Examinee(RECORDS)) as server:
        assert ask(*at(server), "-o", "run")[0] == 0
        code, _, stderr = ask(*at(server), "-o", "run", "--resume", "--temperature", "0.5")
        assert code == 2 and "temperature = 0.0, now it is 0.5" in stderr
        code, _, stderr = ask(*at(server), "-o", "run", "--resume", "--strategy", "cot")
        assert code == 2 and "strategy = 'zs', now it is 'zs+cot'" in stderr
        code, _, stderr = ask("--model", "openai:other", "--base-url", server.url, "-o", "run", "--resume")
        assert code == 2 and "model = 'openai:m', now it is 'openai:other'" in stderr
        write(tmp_path / "d.jsonl", [*RECORDS[:-1], {**RECORDS[-1], "question": "Another?"}])
        code, _, stderr = ask(*at(server), "-o", "run", "--resume")
        assert code == 2 and "data = " in stderr
        code, _, stderr = ask(*at(server), "-o", "run")
        assert code == 6 and "--resume" in stderr
        assert server.calls == 378
        write(tmp_path / "d.jsonl", RECORDS)
        assert ask(*at(server), "-o", "run", "--overwrite", "--types", "mc")[0] == 0
        assert server.calls == 378 + 159


def test_the_same_run_twice_gives_the_same_bytes(ask: Any, tmp_path: Path) -> None:
    with Loopback(Examinee(RECORDS, {r["id"] for r in RECORDS[::3]}), latency=0.001) as server:
        for name, cold in (("one", True), ("two", False)):
            assert ask(*at(server), "--strategy", "sc", "--judge", "openai:j", "-o", f"{name}/run", cold=cold)[0] == 0
    first, second = (
        {p.name: p.read_bytes() for p in (tmp_path / name / "run").iterdir() if p.name != "manifest.json"}
        for name in ("one", "two")
    )
    assert first == second
    manifests = [json.loads((tmp_path / name / "run/manifest.json").read_bytes()) for name in ("one", "two")]
    for manifest in manifests:
        manifest.pop("volatile")
        manifest["results"]["summary"].pop("run")
    assert manifests[0] == manifests[1]


def test_a_run_that_did_nothing_is_not_in_the_way_of_the_next(ask: Any, tmp_path: Path) -> None:
    assert ask("--model", "local:absent/model", "-o", "run")[0] == 5
    assert {path.name for path in tmp_path.iterdir()} == {"d.jsonl"}
    (tmp_path / "run.journal").write_text('{"fingerprint": {"killed": "at once"}}\n')
    assert ask("--model", "mock:oracle", "-o", "run", "--resume")[0] == 0
    (tmp_path / "other.journal").write_text('{"fingerprint": {"killed": "at once"}}\n{"key": "a", "value": {}}\n')
    code, _, stderr = ask("--model", "mock:oracle", "-o", "other")
    assert code == 6 and "other.journal" in stderr


def test_a_bound_on_accuracy_fails_the_command_after_its_summary(ask: Any, tmp_path: Path) -> None:
    with Loopback(Examinee(RECORDS, {r["id"] for r in RECORDS[::3]})) as server:
        arguments = [*at(server), "--types", "mc", "-o", "run"]
        code, summary, stderr = ask(*arguments, "--fail-under", "0.9")
        assert code == 9 and summary["questions"] == 159 and "below --fail-under 0.9" in stderr
        assert (tmp_path / "run/result.json").exists()
        assert ask(*arguments, "--fail-under", "0.9", "--resume")[0] == 9
        assert ask(*arguments, "--fail-under", "0.1", "--resume")[0] == 0


# --- what leaves the house -------------------------------------------------------------------------------------------


def test_a_redacted_run_holds_no_text_of_the_data(ask: Any, tmp_path: Path) -> None:
    """Spec check 29: nothing of a question, option or context longer than twelve characters."""
    with Loopback(but(Examinee(RECORDS), lambda s: ok(s.text[-200:]) if "sentences" in s.text else None)) as server:
        code, _, stderr = ask(*at(server), "--strategy", "cot+sc", "--judge", "match", "--redact", "text", "-o", "run")
    assert code == 0, stderr
    held = b"\n".join(path.read_bytes() for path in (tmp_path / "run").iterdir()).decode()
    assert (tmp_path / "run.journal").exists()  # the replies, which are not to be shown, and serve --resume
    pieces = set()
    for record in RECORDS:
        for text in (record["question"], record["context"] or "", *record.get("options", ())):
            pieces |= {text[i : i + 13] for i in range(len(text) - 12)}
    assert len(pieces) > 500 and not [piece for piece in pieces if piece in held]
    assert sum(CONTEXT.values()) == 169


def test_comparing_runs_prints_paired_tests_and_writes_a_report(ask: Any, tmp_path: Path) -> None:
    for name, step in (("third", 3), ("half", 2)):
        with Loopback(Examinee(RECORDS, {r["id"] for r in RECORDS[::step]})) as server:
            assert ask(*at(server), "--judge", "match", "-o", f"runs/{name}")[0] == 0
    code, summary, stderr = ask("--compare", "runs/half", "-o", "both", data="runs/third")
    assert code == 0, stderr
    (pair,) = summary["comparisons"]["strict"]
    both = sum(n % 2 == 0 == n % 3 for n in range(378))
    assert (pair["n"], pair["both"], pair["only_first"], pair["only_second"]) == (378, both, 126 - both, 189 - both)
    assert pair["difference"] == pytest.approx(63 / 378) and pair["low"] < 63 / 378 < pair["high"]
    assert pair["verdict"] == "half better than third" and pair["verdict"] in stderr
    assert {p.name for p in (tmp_path / "both").iterdir()} == {
        "report.md",
        "report.html",
        "result.json",
        "manifest.json",
    }
    assert ask("--compare", "runs/third", data="runs/third")[0] == 0
    assert ask("--compare", data="runs/third")[0] == 2
    assert ask("--compare", "d.jsonl", data="runs/third")[0] == 5


def test_runs_on_other_questions_are_compared_only_on_what_they_share(ask: Any, tmp_path: Path) -> None:
    with Loopback(Examinee(RECORDS)) as server:
        assert ask(*at(server), "--types", "mc", "-o", "mc")[0] == 0
        assert ask(*at(server), "--types", "mc,math", "-o", "more")[0] == 0
    code, _, stderr = ask("--compare", "more", data="mc")
    assert code == 4 and "--intersect" in stderr
    code, summary, stderr = ask("--compare", "more", "--intersect", data="mc")
    assert code == 0 and summary["comparisons"]["lenient"][0]["n"] == 159


@pytest.mark.parametrize("option", ["verdicts", "ids", "system"])
def test_a_run_is_finished_only_while_the_files_that_options_name_hold_the_same(
    option: str, ask: Any, tmp_path: Path
) -> None:
    write(tmp_path / "d.jsonl", SHORT)
    names = [r["id"] for r in SHORT if r["type"] == "sa"]
    told = {"verdicts": "id,verdict\n{0},1\n", "ids": "{0}\n", "system": "Be {0}."}[option]
    arguments = ["--model", "mock:oracle", "--judge", "human", f"--{option}", "file", "-o", "run"]
    (tmp_path / "file").write_text(told.format(names[0]))
    assert ask(*arguments)[0] == 3
    assert "finished already" in ask(*arguments, "--resume")[2]
    (tmp_path / "file").write_text(told.format(names[1]))
    assert "finished already" not in ask(*arguments, "--resume")[2]


def test_verdicts_on_questions_that_are_not_asked_are_told(ask: Any, tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text("id,verdict\nnobody,1\n")
    code, _, stderr = ask("--model", "mock:oracle", "--verdicts", "v.csv", "-n")
    assert code == 0 and "1 on no question asked, as 'nobody'" in stderr
    assert ask("--model", "mock:oracle", "--verdicts", "absent.csv", "-n")[0] == 5


def test_a_comparison_never_replaces_or_trusts_what_it_should_not(ask: Any, tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", SHORT)
    for name in ("a", "b"):
        assert ask("--model", "mock:oracle", "-o", name)[0] == 0
    code, _, stderr = ask("--compare", "b", "-o", "./b", "--overwrite", data="a")
    assert code == 2 and "one of the runs" in stderr and (tmp_path / "b/answers.jsonl").is_file()
    answers = (tmp_path / "b/answers.jsonl").read_bytes()
    for damaged in (answers[: answers.index(b"\n") + 1], answers.replace(b"true", b"false", 1), b"", b"[]\n"):
        (tmp_path / "b/answers.jsonl").write_bytes(damaged)
        code, _, stderr = ask("--compare", "b", data="a")
        assert code == 5 and "answers.jsonl is not what the run wrote" in stderr
    (tmp_path / "b/manifest.json").write_bytes(b"{}")
    assert ask("--compare", "b", data="a")[0] == 5


def test_hostile_names_cannot_steer_a_terminal_or_a_page(ask: Any, tmp_path: Path) -> None:
    name = "\x1b[31m<img src=x>\u202e</b"
    records = [{**r, "id": f"{name}{i}", "category": name} for i, r in enumerate(SHORT[:3])]
    write(tmp_path / "d.jsonl", records)
    with Loopback(Examinee(records)) as server:
        arguments = ["--model", f"openai:{name}", "--base-url", server.url, "--other-categories", "-v"]
        code, _, stderr = ask(*arguments, "--judge", "match", "-o", "run")
    page, text = ((tmp_path / "run" / file).read_text() for file in ("report.html", "report.md"))
    assert code == 0 and "\x1b" not in stderr + page + text and "\u202e" not in stderr + page + text
    assert "<img" not in page + text


def test_a_judge_at_an_address_of_its_own_is_asked_there(ask: Any, tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", [r for r in SHORT if r["type"] == "sa"])
    with Loopback(Examinee(SHORT)) as model, Loopback(Examinee(SHORT)) as judge:
        arguments = [*at(model), "--judge", "openai:j", "--judge-base-url", judge.url]
        plan = ask(*arguments, "-n")[1]
        assert ask(*arguments, "-o", "run")[0] == 0
        count = sum(r["type"] == "sa" for r in SHORT)
        assert (model.calls, judge.calls, plan["judge_calls"]) == (count, count, count)


def test_the_bound_is_held_against_the_reading_that_heads_the_tables(ask: Any, tmp_path: Path) -> None:
    choice = [r for r in RECORDS if r["type"] == "mc" and r["group"] is None][:4]
    write(tmp_path / "d.jsonl", choice)
    chatty = but(Examinee(choice), lambda s: ok(f"The answer is {Examinee(choice).say(s.text)}."))
    with Loopback(chatty) as server:
        arguments = [*at(server), "-o", "run", "--resume", "--fail-under", "1"]
        assert ask(*arguments)[0] == 0  # exactly the bound is enough
        assert ask(*arguments, "--parser", "strict")[0] == 9


@pytest.mark.parametrize(
    "change", [["--max-tokens", "9"], ["--seed", "1"], ["--model", "openai:n"], ["--system", "s"], ["--shots", "1"]]
)
def test_a_journal_is_not_continued_under_another_setting(change: list[str], ask: Any, tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", SHORT[:2])
    (tmp_path / "s").write_text("Be brief.")
    with Loopback(Examinee(SHORT)) as server:
        arguments = [*at(server), "--strategy", "fs", "--judge", "match", "-o", "run"]
        assert ask(*arguments)[0] == 0
        code, _, stderr = ask(*arguments, *change, "--resume")
        assert code == 2 and "was made with" in stderr


def test_a_persons_verdict_beats_the_judges(ask: Any, tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", SHORT)
    name = next(r["id"] for r in SHORT if r["type"] == "sa")
    (tmp_path / "v.csv").write_text(f"id,verdict\n{name},0\n")
    assert ask("--model", "mock:oracle", "--verdicts", "v.csv", "-o", "run")[0] == 0
    (line,) = [a for a in lines(tmp_path / "run/answers.jsonl") if a["id"] == name]
    assert (line["lenient"]["correct"], line["judgement"]["by"]) == (False, "human")
