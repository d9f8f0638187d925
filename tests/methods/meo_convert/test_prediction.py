"""A dry run foretells the bytes exactly and the memory within a quarter; memory does not grow with the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from methods.meo_convert import mixtures
from methods.meo_convert.test_static import merge
from pomona.errors import UsageError
from pomona.methods.meo_convert.config import Config
from pomona.methods.meo_convert.families import recognise
from pomona.methods.meo_convert.prediction import logits_of, of_upcycling, predict
from pomona.models.checkpoint import Checkpoint, TensorSpec, write_config, write_shards


@pytest.mark.parametrize("arch", ["auto", "single-expert"])
@pytest.mark.parametrize("family", mixtures.FAMILIES)
def test_bytes_tensors_and_parameters_are_foretold_exactly(family: str, arch: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    model = mixtures.make(family)
    source = Checkpoint.open(mixtures.save(model, tmp_path / "in"))
    for shard, save in (("1GB", "source"), ("4KB", "bfloat16")):
        config = Config(arch=arch, shard_size=shard, save_dtype=save)  # type: ignore[arg-type]
        found = predict(source, recognise(source), config)
        out = tmp_path / f"out-{shard}"
        bytes_of = {"1GB": 10**9, "4KB": 4000}
        result = merge(tmp_path / "in", out, arch=arch, dtype=save, shard_bytes=bytes_of[shard])
        assert found["bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors*"))
        assert found["arch"] == result.arch
        assert found["tensors"] == len(result.provenance)
        assert found["merged"] == sum("merged" in told for told in result.provenance.values())
        auto = AutoModelForSeq2SeqLM if family == "switch_transformers" else AutoModelForCausalLM
        assert found["parameters"]["before"] == model.num_parameters()
        assert found["parameters"]["after"] == auto.from_pretrained(out).num_parameters()


def test_stages_that_need_whole_models_are_foretold(tmp_path: Path) -> None:
    source = Checkpoint.open(mixtures.save(mixtures.make("olmoe"), tmp_path / "in"))
    family = recognise(source)
    assert predict(source, family, Config(verify="none", mass="one"))["stages"].keys() == {"conversion"}
    assert predict(source, family, Config(verify="none"))["stages"].keys() == {"conversion", "routing"}
    found = predict(source, family, Config())
    assert found["stages"].keys() == {"conversion", "routing", "verification"}
    assert found["peak_rss_mb"] == max(found["stages"].values())
    with pytest.raises(UsageError, match="no dense family"):
        predict(source, family, Config(arch="dense-twin"))


@pytest.mark.parametrize(("arch", "copies"), [("single-expert", 2), ("dense-twin", 1)])
def test_experts_that_are_packed_while_loading_are_there_twice(arch: Any, copies: int, tmp_path: Path) -> None:
    source = Checkpoint.open(mixtures.save(mixtures.make("mixtral", vocab_size=100_000), tmp_path / "in"))
    found = predict(source, recognise(source), Config(arch=arch, weights="router-prob"))
    before, after = (4 * count / 1e6 for count in found["parameters"].values())
    stages = found["stages"]
    logits = 4 * 8 * 128 * 100_000 / 1e6  # of one batch; a comparison holds them five times
    assert stages["verification"] - stages["routing"] == pytest.approx(copies * after + 4 * logits, abs=0.2)
    resident = stages["conversion"] - 3 * 8 * 2.097152
    assert stages["routing"] - resident == pytest.approx(40 + 2 * before + logits, abs=0.2)


def test_memory_of_upcycling_is_the_largest_stack_and_what_is_run() -> None:
    specs = [TensorSpec("a.weight", "F32", (4, 1000, 1000)), TensorSpec("b.weight", "F32", (100, 10))]
    source = [TensorSpec("a.weight", "F32", (1000, 1000)), *specs[1:], TensorSpec("places", "I64", (1, 500))]
    found = of_upcycling(source, specs, verified=True, batch=16)
    resident = found["stages"]["conversion"] - 16 - 12
    assert found["stages"]["verification"] - resident == pytest.approx(40 + 4 * 5.002, abs=0.2)
    assert found["stages"]["training"] - resident == pytest.approx(40 + 20 * 4.001 + 4 * 16, abs=0.2)
    assert found["peak_rss_mb"] == found["stages"]["training"]


def test_logits_of_a_language_model_are_held_and_those_of_none_are_not(tmp_path: Path) -> None:
    folder = mixtures.save(mixtures.make("mixtral"), tmp_path / "in")
    source = Checkpoint.open(folder)
    config = Config(max_length=100)
    held = logits_of(source, config)
    assert held == 8 * 100 * 64
    source.config["architectures"] = ["MixtralModel"]
    assert logits_of(source, config) == 0
    specs = [TensorSpec("a.weight", "F32", (4, 10, 10))]
    options: dict[str, Any] = {"verified": True, "batch": 1}
    without, with_them = (of_upcycling(specs, specs, logits=n, learnt=n, **options)["stages"] for n in (0, 10**6))
    assert with_them["verification"] - without["verification"] == pytest.approx(20, abs=0.2)
    assert with_them["training"] - without["training"] == pytest.approx(16, abs=0.2)


def test_experts_that_fresh_gates_never_select_are_not_read_from_the_file() -> None:
    specs = [TensorSpec("a.weight", "F32", (4, 1000, 1000))]
    source = [TensorSpec("a.weight", "F32", (1000, 1000))]
    all_read, two_read = (of_upcycling(source, specs, read=n, verified=True)["stages"] for n in (None, 2))
    assert all_read["verification"] - two_read["verification"] == pytest.approx(8, abs=0.2)
    halves = [TensorSpec("a.weight", "BF16", (4, 1000, 1000))]  # made into float32, for which all are read
    first, second = (of_upcycling(source, halves, read=n, verified=True)["stages"] for n in (None, 2))
    assert first["verification"] == pytest.approx(second["verification"], abs=0.2)


# --- check A11 -------------------------------------------------------------------------------------------------------

SIZE, WIDTH, DEPTH, EXPERTS = 1024, 1792, 8, 8

CONVERT = """
import json, sys
from pathlib import Path
from pomona.methods.meo_convert.config import Config
from pomona.methods.meo_convert.families import recognise
from pomona.methods.meo_convert.prediction import of_upcycling, predict
from pomona.methods.meo_convert.static import convert
from pomona.methods.meo_convert.weighting import weights
from pomona.models.checkpoint import Checkpoint
from pomona.runtime.memory import peak

source, folder = map(Path, sys.argv[1:])
checkpoint = Checkpoint.open(source)
family = recognise(checkpoint)
found = predict(checkpoint, family, Config(verify="none"))
folder.mkdir()
convert(checkpoint, family, arch="auto", weights=weights(family, "uniform"), align=None, mass={}, folder=folder,
        shard_bytes=10**10)
found["measured"] = peak() / 1e6
print(json.dumps(found))
"""


def large(folder: Path) -> Path:
    """1.41 GB of float32 experts, random numbers, in three files."""
    folder.mkdir()
    specs = [TensorSpec(name, "F32", (2000, SIZE)) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    for layer in range(DEPTH):
        stem = f"model.layers.{layer}"
        specs += [TensorSpec(f"{stem}.self_attn.{x}_proj.weight", "F32", (SIZE, SIZE)) for x in "qkvo"]
        specs += [TensorSpec(f"{stem}.block_sparse_moe.gate.weight", "F32", (EXPERTS, SIZE))]
        for expert in range(EXPERTS):
            block = f"{stem}.block_sparse_moe.experts.{expert}"
            specs += [TensorSpec(f"{block}.{w}.weight", "F32", (WIDTH, SIZE)) for w in ("w1", "w3")]
            specs += [TensorSpec(f"{block}.w2.weight", "F32", (SIZE, WIDTH))]
    shapes = {spec.name: spec.shape for spec in specs}
    random = torch.Generator().manual_seed(0)
    write_shards(folder, specs, lambda name: torch.randn(shapes[name], generator=random), shard_bytes=600_000_000)
    size = {"hidden_size": SIZE, "intermediate_size": WIDTH, "num_hidden_layers": DEPTH, "vocab_size": 2000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_local_experts": EXPERTS}
    write_config(folder, {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **size, **heads})
    return folder


@pytest.mark.slow
def test_a_large_mixture_is_merged_in_little_memory_as_foretold(tmp_path: Path) -> None:
    source = large(tmp_path / "in")
    weights = list(source.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) > 1_400_000_000
    command = [sys.executable, "-c", CONVERT, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    found = json.loads(done.stdout)
    largest = 4 * SIZE * 2000 / 1e6
    assert found["measured"] < 300 + 4 * largest + 100 < 600, found  # 100: what libraries take varies
    assert found["peak_rss_mb"] == pytest.approx(found["measured"], rel=0.25)
    assert found["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    after = load_file(tmp_path / "out" / "model.safetensors")
    before = {name: value for path in weights for name, value in load_file(path).items()}
    for layer in range(DEPTH):
        for w, role in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            names = [f"model.layers.{layer}.block_sparse_moe.experts.{n}.{w}.weight" for n in range(EXPERTS)]
            stacked = torch.stack([before.pop(name) for name in names])
            merged = after[f"model.layers.{layer}.mlp.{role}_proj.weight"]
            assert torch.equal(merged, stacked.double().mean(0).float())
            torch.testing.assert_close(merged, stacked.mean(0), rtol=1e-5, atol=1e-7)
