"""A model that is given experts computes what it computed, and nothing of it is lost or left over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.meo_convert import mixtures
from methods.meo_convert.tinies import DENSE, ENCODERS
from methods.meo_convert.upcycled import convert, outputs, save_dense
from pomona.errors import CheckFailed, DataError, MissingError, UsageError
from pomona.methods.meo_convert.config import Config
from pomona.methods.meo_convert.families import Family, recognise
from pomona.methods.meo_convert.loading import load
from pomona.methods.meo_convert.static import convert as merge
from pomona.methods.meo_convert.upcycling import block, copies, plan, static_weights
from pomona.models.checkpoint import SHARD, Checkpoint

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 11, 3, 18, 7], [4, 4, 12, 6, 8, 20]])
DESCRIPTION = "the film was good"


def loaded(folder: Path) -> Any:
    return load(folder, dtype=torch.float32, device=CPU)[0]


def plain(folder: Path, family: str) -> Any:
    import transformers

    return getattr(transformers, DENSE[family][0]).from_pretrained(folder)


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["sequence", "token", "task"])
@pytest.mark.parametrize("family", DENSE)
def test_a_fresh_model_with_experts_computes_what_the_dense_one_did(family: str, level: str, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", family)
    convert(source, tmp_path / "meo", level=level, experts=4, task_description=DESCRIPTION)
    expected = outputs(plain(source, family), IDS)
    torch.testing.assert_close(outputs(loaded(tmp_path / "meo"), IDS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", mixtures.FAMILIES)
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_a_mixture_of_equal_experts_computes_what_one_did(family: str, level: str, tmp_path: Path) -> None:
    model = mixtures.alike(mixtures.make(family))
    source = mixtures.save(model, tmp_path / "in")
    done = convert(source, tmp_path / "out", level=level, gate_scope=None)
    found = loaded(tmp_path / "out")
    torch.testing.assert_close(outputs(found, IDS), outputs(model, IDS), rtol=0, atol=1e-5)
    assert done.config["meo"]["experts"] == 4 and done.config["meo"]["scope"] == "prompt"
    added = [name for name, told in done.provenance.items() if "new" in told]
    assert bool(added) == (level == "token") and all(".token." in name for name in added)


def test_a_mixture_keeps_every_tensor_as_it_is(tmp_path: Path) -> None:
    source = mixtures.save(mixtures.make("qwen2_moe"), tmp_path / "in")
    convert(source, tmp_path / "out", level="token")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {name.rpartition(".token.")[2] for name in after.keys() - before.keys()} == {
        "down.weight",
        "down.bias",
        "up.weight",
        "up.bias",
    }


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_every_expert_is_the_map_and_gates_know_nothing(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", "gpt2")
    convert(source, tmp_path / "meo", level="token", experts=3, selected=1, token_reduction=4)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "meo/model.safetensors")
    place = "transformer.h.1.mlp.c_fc"
    for expert in range(3):
        assert torch.equal(after[f"{place}.weight"][expert], before[f"{place}.weight"].T)  # GPT-2 has (d, f)
        assert torch.equal(after[f"{place}.bias"][expert], before[f"{place}.bias"])
    assert after[f"{place}.gate.weight"].tolist() == after[f"{place}.gate.noise"].tolist() == [[0.0] * 16] * 3
    down = after[f"{place}.token.down.weight"]
    assert down.shape == (4, 16) and down.abs().max() <= 0.25 and down.abs().max() > 0.2  # U(-1/sqrt d, 1/sqrt d)
    for zero in ("down.bias", "up.weight", "up.bias"):
        assert not after[f"{place}.token.{zero}"].any()
    others = {name for name in before if ".mlp." not in name}
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert len(after) == len(others) + 4 * (2 + 2 + 4)  # four maps: experts, gate, token block


def test_noise_is_gaussian_of_the_stated_size_and_every_experts_own() -> None:
    source = torch.randn(400, 300, generator=torch.Generator().manual_seed(1)) * 3
    stack = copies(source, 3, 0.05, 7, "some.weight", torch.float32)
    added = (stack - source).flatten(1).double().numpy()
    spread = 0.05 * source.double().numpy().std()
    assert added.std(axis=1) == pytest.approx([spread] * 3, rel=0.01)
    assert np.abs(added.mean(axis=1)).max() < 5 * spread / np.sqrt(source.numel())
    assert np.abs(np.corrcoef(added) - np.eye(3)).max() < 0.02
    assert np.abs(added).max() > 4 * spread  # of 120000, tails of a Gaussian and not of anything bounded
    again = copies(source, 3, 0.05, 7, "some.weight", torch.float32)
    assert torch.equal(stack, again)
    assert not torch.equal(stack[0], copies(source, 3, 0.05, 8, "some.weight", torch.float32)[0])
    assert not torch.equal(stack[0], copies(source, 3, 0.05, 7, "other.weight", torch.float32)[0])


def test_copies_of_bfloat16_are_bits_and_noise_is_rounded_once(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", "llama", dtype=torch.bfloat16)
    done = convert(source, tmp_path / "meo", experts=2)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "meo/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(after[name][1], before[name]) and after[name].dtype == torch.bfloat16
    assert "model.layers.0.mlp.up_proj.gate.weight" not in after  # it shares gate_proj's
    assert done.provenance[name] == {"dtype": "BF16", "copies": name, "experts": 2}
    wide = convert(source, tmp_path / "wide", experts=2, save_dtype="float32", init="noise:0.1")
    found = load_file(tmp_path / "wide/model.safetensors")[name]
    assert found.dtype == torch.float32 and wide.config["dtype"] == "float32"
    assert wide.provenance[name]["noise"] == 0.1
    narrow = convert(source, tmp_path / "narrow", experts=2, init="noise:0.1")
    assert narrow.config["dtype"] == "bfloat16"
    assert torch.equal(load_file(tmp_path / "narrow/model.safetensors")[name], found.bfloat16())


def test_equal_runs_write_equal_bytes_and_shards_hold_the_same(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", "bert")
    for name, seed in (("first", 3), ("again", 3), ("other seed", 4)):
        torch.manual_seed(sum(name.encode()))  # whatever came before
        convert(source, tmp_path / name, level="token", init="noise:0.01", seed=seed)
    bytes_of = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again", "other seed")}
    assert bytes_of["first"] == bytes_of["again"] != bytes_of["other seed"]
    done = convert(source, tmp_path / "shards", level="token", init="noise:0.01", seed=3, shard_bytes=20_000)
    assert sum(name.endswith(".safetensors") for name in done.files) > 2
    whole, shards = Checkpoint.open(tmp_path / "first"), Checkpoint.open(tmp_path / "shards")
    assert whole.specs.keys() == shards.specs.keys()
    assert all(torch.equal(whole.read(name), shards.read(name)) for name in whole.specs)


@pytest.mark.slow
def test_the_directory_loads_with_plain_transformers_in_a_process_of_its_own(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", "bert")
    convert(source, tmp_path / "meo", level="token", init="noise:0.1")
    script = f"""
import sys, torch
from transformers import AutoModelForMaskedLM
options = dict(trust_remote_code=True, output_loading_info=True)
model, report = AutoModelForMaskedLM.from_pretrained({str(tmp_path / "meo")!r}, **options)
assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
assert "pomona" not in sys.modules
torch.save(model(torch.tensor({IDS.tolist()})).logits.detach(), {str(tmp_path / "logits")!r})
"""
    environment = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), outputs(loaded(tmp_path / "meo"), IDS))


# --- the released code's dropped biases ------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "count"), [("bert", 4), ("bart", 8), ("gpt2", 0)])
def test_compat_reference_drops_the_biases_that_the_released_code_drops_and_says_so(
    family: str, count: int, tmp_path: Path
) -> None:
    source = save_dense(tmp_path / "dense", family)
    done = convert(source, tmp_path / "meo", compat="reference", gate_scope="sequence")
    assert len(done.dropped) == count and all(name.endswith(".bias") for name in done.dropped)
    assert not set(done.dropped) & set(done.provenance) and done.config["meo"]["compat"] == "reference"
    drift = (outputs(loaded(tmp_path / "meo"), IDS) - outputs(plain(source, family), IDS)).abs().max()
    assert (drift > 0.01) if count else (drift < 1e-5)


# --- what cannot be converted ----------------------------------------------------------------------------------------


def changed(folder: Path, tensors: dict[str, torch.Tensor | None]) -> None:
    held = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        held.pop(name) if value is None else held.update({name: value})
    save_file(held, folder / "model.safetensors", {"format": "pt"})


FIRST = "bert.encoder.layer.0.output.dense"


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({f"{FIRST}.lora_A.weight": torch.ones(2, 2)}, DataError, f"{FIRST}.lora_A.weight belongs to {FIRST}"),
        ({f"{FIRST}.weight": None}, MissingError, "encoder.layer.0.output.dense.weight is missing"),
        ({f"{FIRST}.bias": None}, MissingError, f"{FIRST}.bias is missing"),
        ({f"{FIRST}.weight": torch.ones(16, 30)}, DataError, f"{FIRST}.weight has the shape .16, 30., config.json"),
        (
            {"bert.encoder.layer.2.output.dense.weight": torch.ones(16, 32)},
            DataError,
            r"encoder.layer.2.output.dense.weight is of no layer",
        ),
    ],
    ids=["leftover", "no weight", "no bias", "shape", "extra layer"],
)
def test_a_tensor_that_is_missing_or_has_no_place_is_named(
    tensors: dict[str, torch.Tensor | None], error: type[Exception], message: str, tmp_path: Path
) -> None:
    source = save_dense(tmp_path / "dense", "bert")
    changed(source, tensors)
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "meo")


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", "bert")
    changed(source, {f"{FIRST}.weight": torch.full((16, 32), torch.inf)})
    for init in ("copy", "noise:0.1"):
        with pytest.raises(CheckFailed, match=f"{FIRST}.weight"):
            convert(source, tmp_path / init, init=init)


def test_a_converted_model_is_not_converted_again(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", "bert")
    convert(source, tmp_path / "meo")
    with pytest.raises(DataError, match="converted before"):
        convert(tmp_path / "meo", tmp_path / "twice")


def test_the_block_says_what_was_asked_and_what_is_usual(tmp_path: Path) -> None:
    families = {name: Family(name, "dense") for name in DENSE if name != "t5 gated"}
    for name, family in families.items():
        meo = block(family, Config(experts=5))
        assert meo["scope"] == ("sequence" if name in ENCODERS else "prompt")
        assert (meo["level"], meo["experts"], meo["selected"]) == ("sequence", 5, 2)
    assert block(families["bert"], Config(experts=1))["selected"] == 1
    assert block(families["llama"], Config(gate_scope="segment:32", level="token"))["scope"] == "segment:32"
    mixture = Family("mixtral", "mixture", experts=8, selected=3)
    assert block(mixture, Config(experts=99))["experts"] == 8 and block(mixture, Config())["selected"] == 3


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("bert", {"selected": 9}, "--selected 9 is more than the 8 experts"),
        ("bert", {"gate_scope": "prompt"}, "--gate-scope prompt is for decoders"),
        ("llama", {"gate_scope": "sequence"}, "would see the tokens it is to predict"),
        ("bart", {"gate_scope": "sequence"}, "would see the tokens it is to predict"),
        ("bert", {"level": "task"}, "need a description of the task"),
        ("bert", {"level": "task", "task_description": "  "}, "need a description of the task"),
    ],
)
def test_options_that_do_not_suit_the_model_are_refused(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        block(Family(family, "dense"), Config(**options))


def test_the_task_level_of_a_mixture_is_a_static_merge() -> None:
    with pytest.raises(UsageError, match="no gates for a task"):
        block(Family("mixtral", "mixture", experts=8, selected=2), Config(level="task"))


# --- task level ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_the_gates_of_a_task_merge_its_experts_into_a_dense_model_that_computes_the_same(
    family: str, tmp_path: Path
) -> None:
    source = save_dense(tmp_path / "dense", family)
    folder = tmp_path / "meo"
    convert(source, folder, level="task", experts=4, init="noise:0.3", task_description=DESCRIPTION)
    held = load_file(folder / "model.safetensors")
    random = torch.Generator().manual_seed(2)
    changed(folder, {n: torch.randn(v.shape, generator=random) for n, v in held.items() if n.endswith("gate.weight")})
    checkpoint = Checkpoint.open(folder)
    converted = recognise(checkpoint)
    weights = static_weights(checkpoint, converted)

    held = load_file(folder / "model.safetensors")
    for name, found in weights.items():
        gated = name.replace("up_proj", "gate_proj")
        narrow = held[f"{gated}.task.embedding.weight"].double() @ held[f"{gated}.task.reduce.weight"].double().T
        # the four tokens of the description differ, so that its mean is the mean over the embedding
        seen = (narrow + held[f"{gated}.task.reduce.bias"].double()).mean(0).numpy()
        logits = held[f"{gated}.gate.weight"].double().numpy() @ seen
        chosen = np.argsort(-logits)[:2]
        expected = np.zeros(4)
        expected[chosen] = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        assert found == pytest.approx(expected, abs=1e-12)

    (tmp_path / "static").mkdir()
    merge(
        checkpoint, converted, arch="auto", weights=weights, align=None, mass={}, folder=tmp_path / "static",
        shard_bytes=SHARD,
    )  # fmt: skip
    expected_outputs = outputs(loaded(folder), IDS)
    torch.testing.assert_close(outputs(plain(tmp_path / "static", family), IDS), expected_outputs, rtol=0, atol=1e-5)
    assert (expected_outputs - outputs(plain(source, family), IDS)).abs().max() > 0.01


def test_gates_that_see_the_input_are_not_a_tasks(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", "bert")
    convert(source, tmp_path / "meo")
    checkpoint = Checkpoint.open(tmp_path / "meo")
    with pytest.raises(UsageError, match="only at the task level"):
        static_weights(checkpoint, recognise(checkpoint))


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_minilm_with_experts_gives_the_sentence_vectors_of_minilm(level: str, tmp_path: Path) -> None:
    from pomona.models.embedded import minilm

    texts = [
        "The film was not good.",
        "It was a long story about a ship, its crew and what became of them all.",
        "Rain.",
    ]
    convert(minilm(), tmp_path / "meo", level=level)
    convert(minilm(), tmp_path / "compat", level=level, compat="reference")
    vectors = []
    for folder in (minilm(), tmp_path / "meo", tmp_path / "compat"):
        model, words = load(folder, dtype=torch.float32, device=CPU)
        batch = words(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            tokens = model(**batch).last_hidden_state
        weights = batch["attention_mask"][:, :, None]
        vectors.append(torch.nn.functional.normalize((tokens * weights).sum(1) / weights.sum(1)))
    torch.testing.assert_close(vectors[1], vectors[0], rtol=0, atol=1e-5)
    assert (vectors[2] - vectors[0]).abs().max() > 0.01
    assert json.loads((tmp_path / "compat/config.json").read_text())["meo"]["compat"] == "reference"
    checkpoint = Checkpoint.open(minilm())
    source = recognise(checkpoint)
    planned = plan(checkpoint, source, block(source, Config(compat="reference")), init="copy", dtype="source", seed=0)
    assert len(planned.dropped) == 12
