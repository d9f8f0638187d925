"""A conversion from its plan to its directory: what is written, measured, trained, kept and refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from methods.meo_convert import mixtures
from methods.meo_convert.conversions import TEXTS, go, report, sentences
from methods.meo_convert.upcycled import save_dense
from pomona.errors import CheckFailed, DataError, MissingError, PomonaError, UsageError
from pomona.models import embedded
from small_bert import tokenizer
from tiny import save_tiny_bert


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A Mixtral whose experts are copies of one another with a little noise, and a tokenizer of words."""
    model = mixtures.alike(mixtures.make("mixtral"))
    random = torch.Generator().manual_seed(0)
    for experts in mixtures.stacks(model):
        for expert in experts[1:]:
            expert.add_(torch.randn(expert.shape, generator=random) * 0.02 * expert.std())
    tokenizer().save_pretrained(tmp_path / "mixture")
    return mixtures.save(model, tmp_path / "mixture")


@pytest.fixture
def strangers(tmp_path: Path) -> Path:
    """A Mixtral whose experts are random, each by itself."""
    tokenizer().save_pretrained(tmp_path / "strangers")
    return mixtures.save(mixtures.make("mixtral"), tmp_path / "strangers")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def nothing_but(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_conversion_is_a_model_its_report_and_a_manifest_that_lists_them(mixture: Path, tmp_path: Path) -> None:
    summary, _, _ = go(mixture, tmp_path / "out")
    assert {"arch", "experts", "flops", "drift", "perplexity", "peak_rss_mb"} <= summary.keys()
    assert summary["arch"] == "dense-twin" and summary["experts"] == {"before": 4, "after": 1, "selected": 2}
    manifest = json.loads((tmp_path / "out/manifest.json").read_bytes())
    on_disk = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert on_disk == {*manifest["files"], "manifest.json"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "report.md", "README.md"} <= on_disk
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == entry["sha256"]
    for entry in manifest["inputs"]:
        if (mixture / entry["name"]).is_file():
            assert hashlib.sha256((mixture / entry["name"]).read_bytes()).hexdigest() == entry["sha256"]
    traced = manifest["results"]["tensors"]
    assert traced.keys() == weights(tmp_path / "out").keys()
    source = weights(mixture)
    for name, entry in traced.items():  # provenance is enough to make the tensor again
        parts = [source[part].double().numpy() for part in entry.get("merged", [entry.get("copied")])]
        again = sum(w * part for w, part in zip(entry.get("weights", [1.0]), parts, strict=True))
        assert np.array_equal(np.asarray(again, dtype=np.float32), weights(tmp_path / "out")[name].numpy())


def test_two_runs_write_the_same_bytes_and_another_seed_other_noise(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "bert", "bert")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        go(source, tmp_path / name, init="noise:0.01", seed=seed)
    a, b, c = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*") if path.name != "manifest.json"}
        for name in "abc"
    )
    assert a == b and a["model.safetensors"] != c["model.safetensors"]
    first, second = (json.loads((tmp_path / name / "manifest.json").read_bytes()) for name in "ab")
    first.pop("volatile"), second.pop("volatile")
    assert first == second


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5 gated", "bart", "llama"])
def test_a_model_made_into_experts_comes_back_to_the_bit(family: str, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "source", family)
    up, _, _ = go(source, tmp_path / "up", experts=3)
    assert up["action"] == "upcycle" and up["drift"]["relative"] == 0 and up["experts"]["after"] == 3
    back, _, _ = go(tmp_path / "up", tmp_path / "back")
    assert back["action"] == "merge" and back["arch"] == "dense-twin"
    before, after = weights(source), weights(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "meo" not in json.loads((tmp_path / "back/config.json").read_bytes())


def test_a_finished_run_resumed_does_nothing_again(mixture: Path, tmp_path: Path) -> None:
    first, _, _ = go(mixture, tmp_path / "out")
    stamp = (tmp_path / "out/manifest.json").stat().st_mtime_ns
    again, _, told = go(mixture, tmp_path / "out", resume=True)
    assert again == first and (tmp_path / "out/manifest.json").stat().st_mtime_ns == stamp
    assert any("finished already" in warning for warning in told.warned)
    (tmp_path / "out").rename(tmp_path / "moved")
    moved, _, _ = go(mixture, tmp_path / "moved", resume=True)
    assert moved == first | {"run": str(tmp_path / "moved")}


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(("mixture", {}), ("mixture", {"level": "token", "selected": 3}), ("mixture", {"save_dtype": "bfloat16"})),
        *(("bert", {"experts": 3}), ("gpt2", {"run_as": "moe", "shard_size": "20KB"}), ("t5", {"level": "token"})),
    ],
)
def test_a_dry_run_foretells_what_a_run_then_does(
    family: str, options: dict[str, Any], mixture: Path, tmp_path: Path
) -> None:
    source = mixture if family == "mixture" else save_dense(tmp_path / "source", family)
    plan, _, _ = go(source, None, dry_run=True, **options)
    assert not list(tmp_path.glob("out*"))
    done, _, _ = go(source, tmp_path / "out", **options)
    assert plan["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors*"))
    found = report(tmp_path / "out")
    assert plan["parameters"] == found["parameters"] and plan["flops"] == found["flops"]
    assert (plan["action"], plan["arch"]) == (done["action"], done["arch"])
    held = sum(value.numel() for path in (tmp_path / "out").glob("*.safetensors") for value in load_file(path).values())
    assert found["parameters"]["after"] == held


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"calib": Path("nowhere.txt")}, MissingError, "nowhere.txt"),
        ({"weights": "nowhere.json"}, MissingError, "nowhere.json"),
        ({"align": "weights", "reference_expert": "7"}, UsageError, "0 to 3"),
        ({"train": Path("nowhere.jsonl")}, MissingError, "nowhere.jsonl"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(
    options: dict[str, Any], error: type[PomonaError], said: str, mixture: Path, tmp_path: Path
) -> None:
    for dry in (True, False):
        with pytest.raises(error, match=said):
            go(mixture, tmp_path / "out", dry_run=dry, **options)
        assert nothing_but(tmp_path, "mixture")


def test_operations_of_experts_that_transformers_groups_are_those_of_eager_ones(pomona, tmp_path: Path) -> None:
    """A6: torch's counter sees nothing of grouped products; the report has 3.225 GFLOP for the block nonetheless."""
    d, f, k, n, tokens, vocabulary = 512, 1024, 2, 8, 512, 64
    model = mixtures.make("mixtral", hidden_size=d, intermediate_size=f, num_hidden_layers=1, num_local_experts=n)
    mixtures.save(model, tmp_path / "mixtral")
    ids = torch.randint(3, vocabulary, (1, tokens))

    def counted() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=ids, use_cache=False)
        return int(counter.get_total_flops())

    done = pomona("meo-convert", "mixtral", "-n", "--verify", "none")
    told = json.loads(done.stdout)["flops"]["512"]["before"]
    block = 2 * tokens * k * 3 * d * f + 2 * tokens * d * n
    assert block / 1e9 == pytest.approx(3.225, abs=5e-4)
    grouped = counted()
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    assert told == counted()
    assert told - grouped >= 2 * tokens * k * 3 * d * f  # all of the experts are lost to the counter
    attention = 2 * tokens * d * (2 * d + 2 * d // 2) + 4 * tokens**2 * d  # two heads of queries, one of keys
    assert told == block + attention + 2 * tokens * d * vocabulary


# --- options that do nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        *(({"experts": 3}, "--experts"), ({"selected": 1}, "--selected"), ({"init": "noise:0.1"}, "--init")),
        *(({"run_as": "moe"}, "--run-as"), ({"gate_scope": "prompt"}, "--gate-scope")),
        *(({"token_reduction": 8}, "--token-reduction"), ({"task_description": "x"}, "--task-description")),
        *(({"compat": "reference"}, "--compat"), ({"reference_expert": "1"}, "--reference-expert")),
        *(({"level": "token", "experts": 3}, "--experts"), ({"level": "token", "init": "noise:1"}, "--init")),
        *(({"level": "token", "task_description": "x"}, "--task-description"), ({"steps": 3}, "--steps")),
        *(({"level": "token", "align": "weights"}, "--align"), ({"label_field": "x"}, "--label-field")),
        ({"level": "sequence", "reference_expert": "1"}, "--reference-expert"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    options: dict[str, Any], flag: str, mixture: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"^{flag} is for "):
        go(mixture, tmp_path / "out", **options)


def test_training_on_alters_nothing_that_was_decided_before(tmp_path: Path) -> None:
    go(save_dense(tmp_path / "bert", "bert"), tmp_path / "up", experts=2, verify="none")
    file = sentences(tmp_path / "texts.jsonl", *TEXTS)
    with pytest.raises(UsageError, match="--run-as was decided"):
        go(tmp_path / "up", tmp_path / "out", train=file, run_as="moe")


# --- mixtures that were kept -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_a_mixture_that_was_kept_merges_into_what_its_source_does(family: str, level: Any, tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "source")
    mixtures.save(mixtures.alike(mixtures.make(family)), tmp_path / "source")
    kept, _, _ = go(tmp_path / "source", tmp_path / "kept", level=level)
    assert kept["action"] == "keep" and kept["drift"]["relative"] < 1e-6
    go(tmp_path / "source", tmp_path / "direct", max_drift=1.0)
    go(tmp_path / "kept", tmp_path / "back", max_drift=1.0)
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "direct/model.safetensors").read_bytes()
    config = json.loads((tmp_path / "back/config.json").read_bytes())
    assert "meo" not in config and "auto_map" not in config


def test_a_token_level_block_that_was_trained_is_not_merged_away(mixture: Path, tmp_path: Path) -> None:
    go(mixture, tmp_path / "kept", level="token")

    def stir(tensors: dict[str, torch.Tensor]) -> None:
        next(value for name, value in tensors.items() if name.endswith("token.up.weight"))[0] = 1.0

    mixtures.changed(tmp_path / "kept", stir)
    with pytest.raises(CheckFailed, match="token-level block"):
        go(tmp_path / "kept", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mixture_that_was_kept_is_trained_on_not_merged_nor_converted_again(mixture: Path, tmp_path: Path) -> None:
    go(mixture, tmp_path / "kept", level="sequence", selected=3)
    assert report(tmp_path / "kept")["experts"] == {"before": 4, "after": 4, "selected": 3}
    with pytest.raises(DataError, match="converted before"):
        go(tmp_path / "kept", tmp_path / "out", level="token")
    file = sentences(tmp_path / "texts.jsonl", *TEXTS)
    summary, _, _ = go(tmp_path / "kept", tmp_path / "out", train=file, steps=1)
    assert summary["action"] == "copy"
    assert json.loads((tmp_path / "out/config.json").read_bytes())["meo"]["selected"] == 3


# --- checks that fail ------------------------------------------------------------------------------------------------


def test_a_missing_expert_is_named(mixture: Path, pomona, tmp_path: Path) -> None:
    """A13, with the exit code."""
    lost = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    mixtures.changed(mixture, lambda tensors: tensors.pop(lost))
    done = pomona("meo-convert", "mixture", "-o", "out")
    assert done.returncode == 5 and done.stdout == b""
    assert done.stderr.splitlines()[0] == f"pomona meo-convert: error: tensor {lost} is missing".encode()
    assert nothing_but(tmp_path, "mixture")


def test_packed_experts_make_the_same_model(tmp_path: Path) -> None:
    """A13: both layouts of one model."""
    model = mixtures.make("olmoe")
    for name, save in (("apart", mixtures.save), ("packed", mixtures.save_packed)):
        (tmp_path / name).mkdir()
        tokenizer().save_pretrained(tmp_path / name)
        go(save(model, tmp_path / name), tmp_path / f"{name}-out", max_drift=2.0)
    first, second = (weights(tmp_path / f"{name}-out") for name in ("apart", "packed"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_experts_that_have_nothing_in_common_are_not_merged(strangers: Path, pomona, tmp_path: Path) -> None:
    """A14, with the exit code."""
    done = pomona("meo-convert", "strangers", "-o", "out")
    assert done.returncode == 9 and done.stdout == b""
    warning, error, hint = done.stderr.decode().splitlines()
    assert "warning: experts have a cosine of" in warning and "--keep-failed" in hint
    least, _, most = error.partition("merged experts are ")[2].partition(" off")[0].partition(" to ")
    assert 0.8 <= float(least) <= float(most) <= 1.1
    assert nothing_but(tmp_path, "strangers")


def test_a_failed_merge_that_is_kept_says_so(strangers: Path, tmp_path: Path) -> None:
    summary, work, told = go(strangers, tmp_path / "out", keep_failed=True)
    assert isinstance(work.failure, CheckFailed) and work.failure.exit_code == 9
    assert summary["drift"]["relative"] > 0.1 and all(
        0.8 < e < 1.1 for e in report(tmp_path / "out")["layers"].values()
    )
    assert "A check failed" in told.shown[0] or "A check failed" in (tmp_path / "out/report.md").read_text()
    assert "A check failed, and it was kept even so" in (tmp_path / "out/README.md").read_text()
    _, again, _ = go(strangers, tmp_path / "out", keep_failed=True, resume=True)
    assert isinstance(again.failure, CheckFailed)


def test_an_architecture_that_is_none_is_refused_by_the_name_of_the_source(mixture: Path, tmp_path: Path) -> None:
    config = json.loads((mixture / "config.json").read_bytes())
    (mixture / "config.json").write_text(json.dumps(config | {"architectures": ["MixtralForNothing"]}))
    with pytest.raises(DataError, match="MixtralForNothing") as caught:
        go(mixture, tmp_path / "out", verify="none")
    assert str(mixture) in caught.value.message and nothing_but(tmp_path, "mixture")


def test_a_segment_longer_than_any_text_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="segment:99999999999"):
        go("nowhere", None, gate_scope="segment:99999999999")


def test_without_a_tokenizer_no_perplexity_is_told(mixture: Path, tmp_path: Path) -> None:
    for file in mixture.glob("token*"):
        file.unlink()
    summary, _, told = go(mixture, tmp_path / "out")
    assert summary["perplexity"] == {"before": None, "after": None} and summary["drift"]["relative"] > 0
    assert "random tokens" in told.warned[0]
    assert "perplexity on" not in (tmp_path / "out/README.md").read_text()


def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path: Path) -> None:
    """Transformers makes one that knows no word; all would be measured on unknown tokens."""
    source = save_tiny_bert(tmp_path / "bert")
    for file in ("vocab.txt", "tokenizer.json"):
        (source / file).unlink()
    with pytest.raises(MissingError, match="no vocabulary"):
        go(source, tmp_path / "out")


# --- training --------------------------------------------------------------------------------------------------------


def test_what_a_trained_classifier_is_made_of_is_told_as_it_is(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "bert", "bert")
    file = sentences(tmp_path / "texts.jsonl", *TEXTS, labels=("good", "bad"))
    options: dict[str, Any] = {"experts": 2, "train": file, "label_field": "label", "steps": 1}
    summary, _, _ = go(source, tmp_path / "out", **options)
    assert summary["training"].keys() == {"before", "after"}
    found, held = report(tmp_path / "out"), weights(tmp_path / "out")
    assert found["architecture"] == "BertForSequenceClassification"
    assert found["parameters"]["after"] == sum(value.numel() for value in held.values())
    traced = json.loads((tmp_path / "out/manifest.json").read_bytes())["results"]["tensors"]
    assert traced.keys() == held.keys() and all(entry["trained"] for entry in traced.values())
    assert traced["classifier.weight"]["new"] == "drawn"
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert traced[query]["copied"] == query
    card = (tmp_path / "out/README.md").read_text()
    assert "AutoModelForSequenceClassification" in card and "before training" in card and str(tmp_path) not in card
    back, _, _ = go(tmp_path / "out", tmp_path / "back")
    assert back["action"] == "merge" and back["drift"]["relative"] < 0.1
    kind = transformers.AutoModelForSequenceClassification
    model, told = kind.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(told.values()) and list(model.config.id2label.values()) == ["bad", "good"]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_classifier_behind_an_encoder_wants_texts_that_end(family: str, tmp_path: Path) -> None:
    source = save_dense(tmp_path / family, family)
    file = sentences(tmp_path / "texts.jsonl", *TEXTS, labels=("good", "bad"))
    options: dict[str, Any] = {"experts": 2, "train": file, "label_field": "label", "steps": 1, "verify": "none"}
    with pytest.raises(DataError, match="end of a text"):
        go(source, tmp_path / "out", **options)
    words = tokenizer()
    words.eos_token = "[SEP]"
    words.save_pretrained(source)
    go(source, tmp_path / "out", **options)
    sentences(file, *TEXTS[:-1], "the [SEP] film", labels=("good", "bad"))
    with pytest.raises(DataError, match="end tokens"):
        go(source, tmp_path / "other", **options)


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_minilm_with_eight_experts_is_minilm_and_without_biases_it_is_not(pomona, tmp_path: Path) -> None:
    """A7 through the command: sentences of the converted model, read by its own code, against those of the source."""
    words = transformers.AutoTokenizer.from_pretrained(embedded.minilm())
    batch = words(list(TEXTS), padding=True, return_tensors="pt")

    def outputs(model: Any) -> torch.Tensor:
        with torch.no_grad():
            states = model.eval()(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))

    expected = outputs(transformers.AutoModel.from_pretrained(embedded.minilm()))
    for level, compat in (("sequence", "none"), ("token", "none"), ("sequence", "reference")):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        done = pomona("meo-convert", "minilm", "--level", level, "--compat", compat, "-o", "out")
        assert done.returncode == 0, done.stderr
        model, told = transformers.AutoModel.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
        assert not any(told.values())
        off = float((outputs(model) - expected).abs().max())
        lost = compat == "reference"
        assert (off > 0.01) if lost else (off <= 1e-5)
        assert (b"lost 12 biases" in done.stderr) is lost
        assert ("lost the biases" in (out / "README.md").read_text()) is lost
