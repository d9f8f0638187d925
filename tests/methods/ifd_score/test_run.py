"""The whole method on a tiny model, against one-by-one float64 arithmetic from the equations."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pomona.errors import CheckFailed, DataError, UsageError

Ifd = Callable[..., Any]
Mean = Callable[[str, str], float]

EQUATION_5 = [(0.696, 0.761, 0.9146), (0.601, 6.593, 0.0912), (3.337, 3.970, 0.8406)]


def words(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choice("abcdefgh ijklm") for _ in range(rng.randint(low, high)))


def some_records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "id": number,
            "instruction": words(rng, 5, 60),
            "input": rng.choice(["", words(rng, 3, 30)]),
            "output": words(rng, 2, 90),
        }
        for number in range(count)
    ]


def plain_prompt(record: dict[str, Any]) -> str:
    return record["instruction"] + "\n" + (record["input"] + "\n" if record["input"] else "")


@pytest.mark.parametrize(("conditioned", "direct", "ifd"), EQUATION_5)
def test_a4_the_papers_worked_values(conditioned: float, direct: float, ifd: float) -> None:
    from pomona.methods.ifd_score.scoring import loss_ratio, ppl_ratio

    assert loss_ratio(conditioned, direct) == pytest.approx(ifd, abs=5e-5)
    assert ppl_ratio(conditioned, direct) == pytest.approx(math.e**conditioned / math.e**direct)


def test_ratios_that_are_no_numbers_are_none() -> None:
    from pomona.methods.ifd_score.scoring import loss_ratio, ppl_ratio

    assert loss_ratio(1.0, 0.0) is None
    assert ppl_ratio(1000.0, 1.0) is None


def test_superfilter_equals_one_by_one_arithmetic(ifd: Ifd, reference: Mean) -> None:
    records = some_records(40)
    for given, got in zip(records, ifd(records).records, strict=True):
        entry = got.pop("ifd")
        assert got == given
        conditioned, direct = reference(plain_prompt(given), given["output"]), reference("", given["output"])
        assert entry["loss_cond"] == pytest.approx(conditioned, abs=1e-5)
        assert entry["loss_direct"] == pytest.approx(direct, abs=1e-5)
        assert entry["ifd"] == entry["ifd_ppl"] == pytest.approx(math.exp(conditioned - direct), rel=2e-5)
        assert entry["ifd_loss"] == pytest.approx(conditioned / direct, abs=2e-6)
        size = len(given["output"])
        assert (entry["n_answer"], entry["n_direct"], entry["n_prompt"]) == (size, size - 1, len(plain_prompt(given)))


def test_cherry_keeps_the_scaffold_and_takes_the_ratio_of_losses(ifd: Ifd, reference: Mean) -> None:
    records = some_records(8)
    for given, got in zip(records, ifd(records, variant="cherry", template="wizardlm").records, strict=True):
        question = given["instruction"] + (f"\nInput:{given['input']}" if given["input"] else "") + "\n\n### Response:"
        conditioned, direct = reference(question, given["output"]), reference("### Response:", given["output"])
        assert got["ifd"]["ifd"] == got["ifd"]["ifd_loss"] == pytest.approx(conditioned / direct, abs=2e-6)
        assert got["ifd"]["n_answer"] == got["ifd"]["n_direct"] == len(given["output"])


@pytest.mark.parametrize(
    "options",
    [
        {"sort_window": 1},
        {"sort_window": 7},
        {"tokens_per_batch": "64"},
        {"tokens_per_batch": "4000"},
        {"batch_size": 3},
        {"chunk_rows": 3},
    ],
)
def test_a3_batches_windows_and_chunks_do_not_change_scores(ifd: Ifd, options: dict[str, Any]) -> None:
    records = some_records(60)
    usual, other = ifd(records, ratio="loss").records, ifd(records, ratio="loss", **options).records
    for one, two in zip(usual, other, strict=True):
        assert abs(one["ifd"]["ifd"] - two["ifd"]["ifd"]) <= 2e-6
    chosen = [
        [r["id"] for r in ifd(records, variant="cherry", keep_top="30%", **more).records] for more in ({}, options)
    ]
    assert chosen[0] == chosen[1] and chosen[0]


def test_a3_order_of_the_input_does_not_change_scores(ifd: Ifd) -> None:
    records = some_records(40)
    forward = {r["id"]: r["ifd"]["ifd_loss"] for r in ifd(records).records}
    for record in ifd(records[::-1]).records:
        assert abs(record["ifd"]["ifd_loss"] - forward[record["id"]]) <= 2e-6


def test_a5_one_token_answer(ifd: Ifd, reference: Mean) -> None:
    record = {"instruction": "Yes?", "input": "", "output": "y"}
    entry = ifd([record]).records[0]["ifd"]
    assert entry["status"] == "no_context_token"
    assert (entry["ifd"], entry["loss_direct"], entry["n_direct"]) == (None, None, 0)
    assert entry["loss_cond"] == pytest.approx(reference("Yes?\n", "y"), abs=1e-5)
    entry = ifd([record], bos="add").records[0]["ifd"]
    assert entry["status"] == "ok" and math.isfinite(entry["ifd"])
    assert entry["loss_direct"] == pytest.approx(reference("</s>", "y"), abs=1e-5)


def test_duplicates_are_computed_once(ifd: Ifd, monkeypatch: pytest.MonkeyPatch) -> None:
    from pomona.models import losses

    computed: list[Any] = []
    real = losses.passage_nll

    def counting(scorer: Any, passages: Any, **more: Any) -> Any:
        computed.extend(passages)
        return real(scorer, passages, **more)

    monkeypatch.setattr(losses, "passage_nll", counting)
    records = some_records(5)
    found = ifd(records * 3).records
    assert len(computed) == len(set(computed)) == 10
    assert [r["ifd"] for r in found[:5]] == [r["ifd"] for r in found[5:10]]


CHAT = [
    {"role": "user", "content": "first thing"},
    {"role": "assistant", "content": "an answer"},
    {"role": "user", "content": "second"},
    {"role": "assistant", "content": "another one"},
    {"role": "user", "content": "third"},
    {"role": "assistant", "content": "the last"},
]


def test_a14_each_turn_is_scored_in_its_context(ifd: Ifd, reference: Mean) -> None:
    entry = ifd([{"messages": CHAT}], turns="each", ratio="loss").records[0]["ifd"]
    contexts = ["first thing\n", "first thing\nan answer\nsecond\n"]
    contexts.append(contexts[1] + "another one\nthird\n")
    answers = ["an answer", "another one", "the last"]
    expected = [reference(c, a) / reference("", a) for c, a in zip(contexts, answers, strict=True)]
    assert [turn["ifd"] for turn in entry["ifd_turns"]] == pytest.approx(expected, abs=2e-6)
    alone = {"instruction": contexts[2].removesuffix("\n"), "input": "", "output": "the last"}
    single = ifd([alone], ratio="loss").records[0]["ifd"]["ifd"]
    last = ifd([{"messages": CHAT}], ratio="loss").records[0]["ifd"]
    assert entry["ifd"] == pytest.approx(single, abs=2e-6) and last["ifd"] == pytest.approx(single, abs=2e-6)
    mean = ifd([{"messages": CHAT}], ratio="loss", turns="mean").records[0]["ifd"]
    assert mean["ifd"] == pytest.approx(sum(expected) / 3, abs=2e-6)
    assert "ifd_turns" not in mean and mean["n_answer"] == sum(map(len, answers))


def test_turns_of_one_conversation_share_its_forward_pass(ifd: Ifd, monkeypatch: pytest.MonkeyPatch) -> None:
    from pomona.models import losses

    computed: list[Any] = []
    real = losses.passage_nll
    monkeypatch.setattr(losses, "passage_nll", lambda s, p, **more: (computed.extend(p), real(s, p, **more))[1])
    ifd([{"messages": CHAT}], turns="each")
    assert sorted(len(passage.spans) for passage in computed) == [1, 1, 1, 3]


@pytest.mark.parametrize("variant", ["superfilter", "cherry"])
def test_a13_the_same_exchange_in_every_layout_has_the_same_score(ifd: Ifd, variant: str) -> None:
    flat = [{"instruction": f"Say {n} twice.", "output": f"{n} {n}, said" + " twice" * n} for n in range(6)]
    layouts = [
        flat,
        [{**record, "input": ""} for record in flat],
        [{"prompt": r["instruction"], "answer": r["output"]} for r in flat],
        [
            {"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]}
            for r in flat
        ],
        [
            {"conversations": [{"from": "human", "value": r["instruction"]}, {"from": "gpt", "value": r["output"]}]}
            for r in flat
        ],
    ]
    named = [{}, {}, {"instruction_field": "prompt", "output_field": "answer"}, {}, {}]
    scores = [
        [record["ifd"] for record in ifd(records, variant=variant, **fields).records]
        for records, fields in zip(layouts, named, strict=True)
    ]
    assert all(found == scores[0] for found in scores[1:])


def test_reverse_scores_the_instruction_and_leaves_the_score_beside_it(ifd: Ifd, reference: Mean) -> None:
    record = {"instruction": "Say it", "input": " twice", "output": "it it"}
    forward = ifd([record]).records[0]
    entry = ifd([forward], reverse=True).records[0]["ifd"]
    assert entry["ifd"] == forward["ifd"]["ifd"]
    question = (
        "Here is a response that was written to follow an instruction.\nit it\nWrite the instruction that it follows.\n"
    )
    assert entry["reverse"]["loss_cond"] == pytest.approx(reference(question, "Say it twice"), abs=1e-5)
    assert entry["reverse"]["loss_direct"] == pytest.approx(reference("", "Say it twice"), abs=1e-5)
    assert ifd([{**forward, "ifd": entry}]).records[0]["ifd"]["reverse"] == entry["reverse"]


def test_everything_comes_out_without_selection_and_adds_up_with_it(ifd: Ifd) -> None:
    records = [*some_records(30), {"instruction": "i", "output": ""}, {"instruction": "i" * 2000, "output": "o"}]
    every = ifd(records)
    assert every.summary["out"] == 32 and every.summary["filtered"] == 0
    assert every.summary["statuses"] == {"empty_answer": 1, "ok": 30, "prompt_too_long": 1}
    chosen = ifd(records, keep_top="10%")
    below_one = sorted((r["ifd"]["ifd"] for r in every.records if (r["ifd"]["ifd"] or 9) < 1), reverse=True)
    assert [r["ifd"]["ifd"] for r in chosen.records] == below_one[:3]
    assert [r["ifd"]["rank"] for r in chosen.records] == [1, 2, 3]
    assert all(r["ifd"]["selected"] is True for r in chosen.records)
    by = chosen.summary["filtered_by"]
    assert by["empty_answer"] == by["prompt_too_long"] == 1
    assert chosen.summary["in"] == chosen.summary["out"] + chosen.summary["filtered"] == 32


def test_selecting_from_scored_records_gives_what_selecting_while_scoring_gives(ifd: Ifd) -> None:
    records = some_records(40)
    for options in ({"keep_top": "20%"}, {"variant": "cherry", "keep_top": "7"}, {"min_ifd": 0.5, "max_ifd": 1.5}):
        variant = {"variant": options["variant"]} if "variant" in options else {}
        scored = ifd(records, **variant).records
        again = ifd(scored, model="/there/is/no/such/model", **options)
        assert again.raw == ifd(records, **options).raw and again.records


def test_selecting_from_scored_records_imports_no_torch(tmp_path: Path) -> None:
    lines = [json.dumps({"output": "o", "ifd": {"ifd": n / 10, "status": "ok"}}) for n in range(15)]
    (tmp_path / "scored.jsonl").write_text("\n".join(lines))
    code = (
        "import sys, io; from pathlib import Path\n"
        "from pomona.io.stream import Stream, StreamOptions\n"
        "from pomona.methods.ifd_score.config import Config\n"
        "from pomona.methods.ifd_score.run import run\n"
        "from pomona.runtime.progress import Quiet\n"
        "from pomona.runtime.settings import Settings\n"
        "config, settings, out = Config(keep_top='2'), Settings(), io.BytesIO()\n"
        "with Stream('ifd-score', ('scored.jsonl',), StreamOptions(), settings, stdout=out, progress=Quiet(), "
        "own_key='ifd', described={}) as stream:\n"
        "    run(config, settings, stream)\n"
        "print(out.getvalue().decode().count('selected'), sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "2 []\n", done.stderr


def test_the_reference_scripts_fields_can_be_selected_from(ifd: Ifd) -> None:
    scored = [{"id": n, "output": "o", "ifd_ppl": s} for n, s in enumerate([0.2, 0.9, 1.0, 1.0001, None, 0.95])]
    chosen = ifd(scored, keep_top="50%")
    assert [r["id"] for r in chosen.records] == [5, 1, 0]
    assert chosen.records[0]["ifd"] == {"ifd": 0.95, "status": "ok", "rank": 1, "selected": True}


def test_a_record_without_score_among_scored_ones_is_bad_input(ifd: Ifd, tmp_path: Path) -> None:
    mixed = [{"ifd": {"ifd": 0.4, "status": "ok"}, "output": "o"}, *some_records(1)]
    with pytest.raises(DataError, match="not scored"):
        ifd(mixed, keep_top="1")
    chosen = ifd(mixed, keep_top="1", rejects=tmp_path / "rejects.jsonl")
    assert chosen.summary["rejected_by"] == {"not scored": 1} and chosen.summary["out"] == 1
    assert len(ifd(some_records(4), keep_top="1").records) == 1


def test_rescore_scores_scored_records_again(ifd: Ifd) -> None:
    stale = [{**record, "ifd": {"ifd": 0.5, "status": "ok"}} for record in some_records(6)]
    found = ifd(stale, rescore=True, max_ifd=1e9).records
    assert len(found) == 6 and all(r["ifd"]["n_answer"] for r in found)


class Killed(BaseException):
    """Stands in for the end of the process: no handler of ours catches it."""


def test_a10_an_interrupted_run_continues_to_the_same_bytes_and_computes_nothing_twice(
    ifd: Ifd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pomona.models import losses

    records, real = some_records(120), losses.passage_nll
    calls: list[tuple[Any, ...]] = []

    def until(limit: int) -> Any:
        def measure(scorer: Any, passages: Any, **more: Any) -> Any:
            if len(calls) == limit:
                raise Killed
            calls.append(tuple(passages))
            return real(scorer, passages, **more)

        return measure

    options: dict[str, Any] = {"tokens_per_batch": "100", "sort_window": 32}
    whole = ifd(records, **options, output=tmp_path / "whole.jsonl").raw
    for limit in (1, 4, 7):
        calls.clear()
        output = tmp_path / f"{limit}.jsonl"
        monkeypatch.setattr(losses, "passage_nll", until(limit))
        with pytest.raises(Killed):
            ifd(records, **options, output=output)
        assert not output.exists()
        monkeypatch.setattr(losses, "passage_nll", until(10**9))
        assert ifd(records, **options, output=output, resume=True).raw == whole
        assert len(calls) == len(set(calls)) > limit


def test_a12_out_of_memory_halves_the_batch_and_scores_nothing_zero(ifd: Ifd, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from pomona.models import losses

    records, real = some_records(30), losses._nll
    usual = ifd(records).records
    refused = []

    def cramped(model: Any, passages: Any, *more: Any) -> Any:
        if len(passages) > 2:
            refused.append(len(passages))
            raise torch.OutOfMemoryError("no room")
        return real(model, passages, *more)

    monkeypatch.setattr(losses, "_nll", cramped)
    for one, two in zip(usual, ifd(records).records, strict=True):
        assert two["ifd"]["loss_cond"] == pytest.approx(one["ifd"]["loss_cond"], abs=2e-6)
    assert refused


def test_a11_another_template_does_not_continue_the_journal(ifd: Ifd, tmp_path: Path) -> None:
    journal = tmp_path / "j"
    ifd(some_records(3), journal=journal)
    ifd(some_records(3), journal=journal, resume=True)
    with pytest.raises(UsageError, match="template = 'plain', now it is 'alpaca'"):
        ifd(some_records(3), journal=journal, resume=True, template="alpaca")


def test_a_damaged_model_gives_no_numbers_and_says_so(ifd: Ifd, model_directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(model_directory, broken)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][5:9] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match="finite"):
        ifd(some_records(3), model=str(broken))


def test_dry_run_counts_without_weights(ifd: Ifd, model_directory: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_directory, bare)
    (bare / "model.safetensors").write_bytes(b"not weights")
    records = some_records(20)
    plan = ifd([*records, {"instruction": "i", "output": ""}], model=str(bare), dry_run=True).summary
    lengths = [len(plain_prompt(r)) + 2 * len(r["output"]) for r in records]
    assert (plan["records"], plan["sequences"], plan["tokens"]) == (21, 40, sum(lengths))
    assert plan["statuses"] == {"empty_answer": 1, "ok": 20}
    assert plan["batches"] >= sum(lengths) / 512


def test_empty_input_needs_no_model(ifd: Ifd) -> None:
    assert ifd([], model="/there/is/no/such/model").summary["in"] == 0


def test_a_record_without_answer_field_is_rejected_with_its_place(ifd: Ifd) -> None:
    with pytest.raises(DataError, match=r'input.jsonl:2: field "output" is missing'):
        ifd([*some_records(1), {"instruction": "i"}])


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(pomona: Callable[..., Any], model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in some_records(60)))
    options = ["in.jsonl", "--model", str(model_directory), "--device", "cpu", "--dtype", "float32"]
    options += ["--tokens-per-batch", "200"]
    assert pomona("ifd-score", *options, "-o", "one.jsonl").returncode == 0
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "pomona_cli",
    ]
    done = subprocess.run([*launch, "ifd-score", *options, "-o", "two.jsonl"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


# --- pre-experience --------------------------------------------------------------------------------------------------

BRIEF: dict[str, Any] = {"clusters": 4, "per_cluster": 3, "train_batch": 4, "learning_rate": 1e-2}


def test_experience_trains_saves_and_is_used_again(ifd: Ifd, model_directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    records, brief = some_records(60), tmp_path / "brief"
    first = ifd(records, **BRIEF, experience=brief)
    told = json.loads((brief / "experience.json").read_text())
    assert 4 <= len(told["chosen"]) <= 12 and set(told["chosen"]) <= set(range(60))
    assert told["losses"][-1] < told["losses"][0]
    assert not list(tmp_path.glob(".brief*"))
    before, after = (load_file(path / "model.safetensors") for path in (model_directory, brief))
    assert any(not before[name].equal(after[name]) for name in before)
    assert first.records[0]["ifd"]["loss_cond"] < ifd(records).records[0]["ifd"]["loss_cond"]

    stamp = (brief / "model.safetensors").stat().st_mtime_ns
    again = ifd(records, **BRIEF, experience=brief)
    assert again.raw == first.raw and (brief / "model.safetensors").stat().st_mtime_ns == stamp
    assert ifd(records, model=str(brief)).raw == first.raw
    other = tmp_path / "other"
    ifd(records, **BRIEF, experience=other)
    assert (other / "model.safetensors").read_bytes() == (brief / "model.safetensors").read_bytes()


def test_experience_of_other_settings_is_refused(ifd: Ifd, tmp_path: Path) -> None:
    from pomona.errors import OutputError

    ifd(some_records(20), **BRIEF, experience=tmp_path / "brief")
    with pytest.raises(UsageError, match="per_cluster = 3, now it is 2"):
        ifd(some_records(20), **{**BRIEF, "per_cluster": 2}, experience=tmp_path / "brief")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no brief model"):
        ifd(some_records(20), **BRIEF, experience=tmp_path / "full")


def test_experience_that_diverges_saves_nothing(ifd: Ifd, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="not finite"):
        ifd(some_records(40), **{**BRIEF, "learning_rate": 1e30}, experience=tmp_path / "brief")
    assert not (tmp_path / "brief").exists() and not list(tmp_path.glob(".brief*partial"))


def test_a_step_learns_from_the_mean_over_its_answer_tokens_however_it_is_split(model_directory: Path) -> None:
    """The first step's loss is the untouched model's: the mean over all answer tokens, the prompts left out."""
    import torch

    from pomona.methods.ifd_score.experience import brief_epoch
    from pomona.models.loading import load_causal_lm
    from pomona.runtime.device import Runtime
    from pomona.runtime.progress import Quiet

    rng = random.Random(1)
    examples = [(tuple(rng.randrange(2, 250) for _ in range(size)), size // 3) for size in (12, 30, 7, 51)]
    changed = []
    for budget in (20, 1000):
        scorer = load_causal_lm(str(model_directory), Runtime.open("cpu", "float32", 0))
        total = 0.0
        for ids, start in examples:
            with torch.no_grad():
                log_p = scorer.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            total -= sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids)))
        losses = brief_epoch(
            scorer, examples, batch=8, learning_rate=1e-4, seed=0, tokens_per_batch=budget, progress=Quiet()
        )
        assert losses == [pytest.approx(total / sum(len(ids) - start for ids, start in examples), rel=1e-5)]
        changed.append(scorer.model.lm_head.weight.detach().clone())
    assert torch.allclose(*changed, atol=2e-5)
