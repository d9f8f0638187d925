"""One process and two take the same steps, and what was trained can be written, merged and read."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from methods.meo_convert import mixtures
from methods.meo_convert.upcycled import convert, save_dense
from pomona.errors import MissingError
from pomona.io.labelled import Labelled
from pomona.methods.meo_convert.config import TrainingOptions
from pomona.methods.meo_convert.families import recognise
from pomona.methods.meo_convert.launch import Job, Launch
from pomona.methods.meo_convert.loading import save
from pomona.methods.meo_convert.static import convert as merge
from pomona.methods.meo_convert.upcycling import static_weights
from pomona.models.checkpoint import SHARD, Checkpoint
from pomona.models.embedded import minilm
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Quiet
from small_bert import save_small_bert, sentences, tokenizer

_LAUNCHED = """
import dataclasses, json, sys
from pathlib import Path
from methods.meo_convert.test_launch import job
from pomona.methods.meo_convert.launch import Launch
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Quiet

runtime = Runtime.open("cpu", "float32", 0)
launch = Launch(runtime, Quiet())
if runtime.is_main:
    from safetensors.torch import save_file
    model, _, result = launch.train(job(Path(sys.argv[1]), json.loads(sys.argv[2])))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, "trained.safetensors")
    Path("result.json").write_text(json.dumps(dataclasses.asdict(result)))
    runtime.close()
else:
    runtime.serve()
"""


def options(**changed: Any) -> TrainingOptions:
    usual = {"train": Path("x"), "label_field": "label", "steps": 6, "learning_rate": 2e-3, "balance": 0.5}
    return TrainingOptions(**{**usual, **changed})


def job(folder: Path, changed: dict[str, Any]) -> Job:
    labelled = sentences()
    test = Labelled(labelled.texts[::3], labelled.labels[::3], labelled.names)
    return Job(folder, labelled, test, options(), seed=1, **changed)


def alone(job: Job) -> tuple[Any, Any, Any]:
    return Launch(Runtime(None, torch.device("cpu"), torch.float32, "a test", 1), Quiet()).train(job)


def launched(folder: Path, processes: int, **changed: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The result and the weights of `processes`, started in the folder above that of the model."""
    place = folder.parent
    (place / "launched.py").write_text(_LAUNCHED)
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *start, "launched.py", str(folder), json.dumps(changed)],
        cwd=place,
        capture_output=True,
        timeout=200,
        env={**os.environ, **alone, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads((place / "result.json").read_text()), load_file(place / "trained.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small BERT, dropout and all, with experts that differ."""
    source = save_small_bert(tmp_path / "dense", initializer_range=0.2)
    convert(source, tmp_path / "meo", level="sequence", experts=4, init="noise:0.1")
    return tmp_path / "meo"


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "changed"), [(2, {}), (3, {"batch_size": 20}), (2, {"batch_size": 5})])
def test_processes_share_a_batch_and_change_nothing(processes: int, changed: dict[str, Any], folder: Path) -> None:
    """Dropout, the gates' noise and the balance of the whole batch included; even where one has nothing to do."""
    model, _, expected = alone(job(folder, changed))
    found, weights = launched(folder, processes, **changed)
    assert found["losses"] == pytest.approx(expected.losses, abs=1e-5)
    assert found["balances"] == pytest.approx(expected.balances, rel=1e-4)
    assert found["before"]["nll"] == pytest.approx(expected.before.nll, abs=1e-12)
    assert found["after"]["nll"] == pytest.approx(expected.after.nll, abs=1e-4)
    assert found["after"]["predicted"] == expected.after.predicted == 48
    head, due = weights["classifier.weight"], model.classifier.weight
    torch.testing.assert_close(head, due.detach(), rtol=0, atol=1e-5)


def test_the_model_that_comes_back_is_the_trained_one(folder: Path) -> None:
    model, tokenizer, result = alone(job(folder, {}))
    again, _, repeated = alone(job(folder, {}))
    assert result == repeated and result.names == ("negative", "positive")
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))
    assert len(result.losses) == 6 and len(tokenizer) > 20


def test_a_model_without_a_tokenizer_cannot_train(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(MissingError, match="no tokenizer to train with"):
        alone(job(folder, {}))


# --- from a dense model to a dense model, by way of experts ----------------------------------------------------------


def test_experts_trained_for_a_task_merge_into_a_plain_model_that_scores_the_same(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    source = save_small_bert(tmp_path / "dense", initializer_range=0.2)
    convert(source, tmp_path / "meo", level="task", experts=4, task_description="the film was good")
    for name in ("trained", "static"):
        (tmp_path / name).mkdir()
    longer = dataclasses.replace(job(tmp_path / "meo", {}), config=options(steps=20))
    model, tokenizer, _ = alone(longer)
    save(model, tokenizer, tmp_path / "trained", dtype=torch.float32)
    checkpoint = Checkpoint.open(tmp_path / "trained")
    family = recognise(checkpoint)
    weights = static_weights(checkpoint, family)
    assert all(sum(gate > 0 for gate in found) == 2 for found in weights.values())
    assert any(abs(gate - 0.5) > 1e-4 for found in weights.values() for gate in found)  # the gates have learned
    place = tmp_path / "static"
    merge(checkpoint, family, arch="auto", weights=weights, align=None, mass={}, folder=place, shard_bytes=SHARD)
    plain, report = BertForSequenceClassification.from_pretrained(place, output_loading_info=True)
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
    batch = tokenizer(["the film was not very good", "the meal was dull"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(**batch).logits, model.eval()(**batch).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("level", "scope"), [("sequence", "segment:3"), ("token", "prompt"), ("task", None)])
def test_a_decoder_with_experts_learns_language(level: str, scope: str | None, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", "llama")
    given = {"task_description": "the film was good"} if level == "task" else {}
    convert(source, tmp_path / "meo", level=level, gate_scope=scope, experts=4, **given)
    texts = Labelled(sentences().texts, [], [])
    config = options(steps=30, learning_rate=5e-3, label_field=None)
    _, _, result = alone(Job(tmp_path / "meo", texts, Labelled(texts.texts[::5], [], []), config, seed=0))
    assert result.objective == "causal" and result.before.perplexity and result.after.perplexity
    assert result.after.perplexity < result.before.perplexity / 2
    assert bool(result.balances) == (level != "task")


def test_a_mixture_whose_experts_are_merged_learns_language(tmp_path: Path) -> None:
    source = mixtures.save(mixtures.make("mixtral"), tmp_path / "in")
    tokenizer().save_pretrained(source)
    convert(source, tmp_path / "meo", level="sequence")
    texts = Labelled(sentences().texts, [], [])
    config = options(steps=30, learning_rate=5e-3, label_field=None)
    _, _, result = alone(Job(tmp_path / "meo", texts, Labelled(texts.texts[::5], [], []), config, seed=0))
    assert result.before.perplexity and result.after.perplexity
    assert result.after.perplexity < result.before.perplexity / 2
    assert result.balances == ()  # its router is its own


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_minilm_learns_sentiment_with_experts_merged_or_mixed(tmp_path: Path) -> None:
    records = [json.loads(line) for line in (ROOT / "data/sentiment.jsonl").read_text().splitlines()]
    parts = []
    for part in ("train", "test"):
        chosen = [record for record in records if record["split"] == part]
        places = [["negative", "positive"].index(record["label"]) for record in chosen]
        parts.append(Labelled([(record["text"],) for record in chosen], places, ["negative", "positive"]))
    found = []
    for run_as in ("meo", "moe"):
        convert(minilm(), tmp_path / run_as, level="sequence", run_as=run_as)
        config = options(steps=60, learning_rate=1e-4, balance=0.01)
        found.append(alone(Job(tmp_path / run_as, *parts, config, seed=0))[2])
    for result in found:
        assert result.before.accuracy < 0.7 and result.after.accuracy >= 0.95 and result.after.nll < 0.2
    assert found[0].losses == pytest.approx(found[1].losses, abs=1e-3)
