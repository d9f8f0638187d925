"""A model is loaded whole and from safe files, or refused by name."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pomona.errors import MissingError, UnavailableError
from pomona.models import embedded
from pomona.models.loading import Scorer, load_causal_lm, load_model, load_tokenizer
from pomona.models.losses import Passage, passage_nll
from pomona.runtime.device import Runtime


def load(name: str | Path | None, dtype: torch.dtype = torch.float32, **options: Any) -> Scorer:
    runtime = Runtime(None, torch.device("cpu"), dtype, "a test", 1)
    return load_causal_lm(None if name is None else str(name), runtime, **options)


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copied"))


def forward_nll(logits: Any, ids: list[int]) -> float:
    """Summed NLL of all tokens but the first, float64 NumPy."""
    rows = logits.double().numpy()[: len(ids) - 1]
    log_p = rows - rows.max(-1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(-1, keepdims=True))
    return float(-log_p[np.arange(len(ids) - 1), ids[1:]].sum())


IDS = [5, 9, 130, 7, 7, 200, 31]


def measured(scorer: Scorer) -> float:
    passage = Passage(tuple(IDS), ((1, len(IDS)),))
    return passage_nll(scorer, [passage], tokens_per_batch=64, chunk_rows=64)[0][0]


# --- what can be loaded ----------------------------------------------------------------------------------------------


def test_a_directory_gives_its_own_weights_ready_to_score(tiny_model: Path) -> None:
    from transformers import LlamaForCausalLM

    scorer = load(tiny_model)
    plain = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = forward_nll(plain(torch.tensor([IDS])).logits[0], IDS)
    assert measured(scorer) == pytest.approx(expected, rel=1e-5)
    assert not scorer.model.training and not any(p.requires_grad for p in scorer.model.parameters())
    assert scorer.shares_heads
    assert scorer.tokenizer.decode(scorer.tokenizer("Grüße")["input_ids"]) == "Grüße"
    assert scorer.identity["model"] == str(tiny_model) and scorer.identity["dtype"] == "float32"


def test_the_number_format_is_the_runtimes(tiny_model: Path) -> None:
    scorer = load(tiny_model, torch.bfloat16)
    assert {p.dtype for p in scorer.model.parameters()} == {torch.bfloat16}
    assert scorer.identity["dtype"] == "bfloat16"


def test_shards_are_joined(tiny_model: Path, copied: Path) -> None:
    shard(copied)
    assert measured(load(copied)) == measured(load(tiny_model))


@pytest.mark.parametrize("name", [None, "smollm2"])
def test_the_embedded_model_is_what_no_name_and_its_name_mean(
    name: str | None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "smollm2", lambda: tiny_model)
    scorer = load(name)
    assert scorer.identity["model"] == "smollm2"
    assert scorer.identity["revision"] == load(tiny_model).identity["revision"]
    assert len(load_tokenizer(name)) == len(scorer.tokenizer)


def test_a_tokenizer_needs_no_weights_to_be_read(copied: Path) -> None:
    (copied / "model.safetensors").write_bytes(b"")
    assert load_tokenizer(str(copied))("ab")["input_ids"] == load_tokenizer(str(copied))("ab")["input_ids"] != []


# --- identity --------------------------------------------------------------------------------------------------------


def test_the_identity_is_of_the_content_and_feels_one_byte(copied: Path, tmp_path: Path) -> None:
    before = load(copied).identity["revision"]
    elsewhere = Path(shutil.copytree(copied, tmp_path / "elsewhere"))
    (elsewhere / "README.md").write_text("a note")
    assert load(elsewhere).identity["revision"] == before
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(weights)
    assert load(copied).identity["revision"] != before


def test_the_identity_feels_the_tokenizer(copied: Path) -> None:
    before = load(copied).identity["revision"]
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps({**settings, "note": 1}))
    assert load(copied).identity["revision"] != before


# --- what is refused -------------------------------------------------------------------------------------------------


def shard(folder: Path) -> list[str]:
    """Split the weights in three files with an index, as large models are."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    files = [f"model-{n + 1:05}-of-00003.safetensors" for n in range(3)]
    for n, file in enumerate(files):
        save_file({name: weights[name] for name in names[n::3]}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: files[n % 3] for n, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return files


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def without_a_shard(folder: Path) -> None:
    (folder / shard(folder)[1]).unlink()


def with_a_damaged_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [')


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def of_another_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))


def of_an_unknown_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no_such_kind"}')


def without_words(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("config.json"), "config.json is missing"),
        (without("model.safetensors"), "model.safetensors is missing"),
        (without_a_shard, "1 of 3 shards missing: model-00002-of-00003.safetensors"),
        (with_a_damaged_index, "model.safetensors.index.json is damaged"),
        (cut_short, "cannot be loaded"),
        (without_a_weight, "1 weights are missing, among them model.layers.1.mlp.up_proj.weight"),
        (of_another_width, "cannot be loaded"),
        (of_an_unknown_kind, "cannot be loaded"),
        (without_words, "cannot be loaded"),
    ],
)
def test_a_damaged_directory_is_refused_in_one_line(damage: Callable[[Path], None], message: str, copied: Path) -> None:
    damage(copied)
    with pytest.raises(MissingError) as caught:
        load(copied)
    assert message in caught.value.message and str(copied) in caught.value.message
    assert "\n" not in caught.value.message and caught.value.exit_code == 5


class Payload:
    """Pickled, it touches a file when it is loaded."""

    def __init__(self, trap: Path) -> None:
        self._trap = trap

    def __reduce__(self) -> Any:
        return Path.touch, (self._trap,)


def test_pickled_weights_are_never_opened(copied: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(MissingError, match=r"a pickle \(pytorch_model.bin\)") as caught:
        load(copied)
    assert not trap.exists()
    assert "safetensors" in (caught.value.hint or "")
    pickle.loads((copied / "pytorch_model.bin").read_bytes())  # the trap does work
    assert trap.exists()


def test_pickled_weights_beside_safe_ones_are_left_alone(tiny_model: Path, copied: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    (copied / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(trap)))
    assert measured(load(copied)) == measured(load(tiny_model))
    assert not trap.exists()


def test_code_in_a_model_directory_is_not_run_even_if_standard_input_says_yes(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "sprung"
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    config = json.loads((copied / "config.json").read_text())
    own = {"model_type": "own_kind", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (copied / "config.json").write_text(json.dumps({**config, **own}))
    (copied / "own.py").write_text(f"import pathlib\npathlib.Path({str(trap)!r}).touch()\n")
    tokens = json.loads((copied / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (copied / "tokenizer_config.json").write_text(json.dumps({**tokens, **own}))
    for attempt in (load, lambda name: load_tokenizer(str(name))):
        with pytest.raises(MissingError, match="cannot be loaded"):
            attempt(copied)
    assert not trap.exists()
    assert sys.stdin.read() == "y\n" * 9


@pytest.mark.parametrize("name", ["missing.gguf", "./missing", "/nowhere/model", "a/b/c", "~/model"])
def test_a_path_that_is_not_there_is_not_asked_for_on_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError, match="no such directory") as caught:
        load(name)
    assert name in caught.value.message
    with pytest.raises(MissingError, match="no such directory"):
        load_tokenizer(name)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(MissingError, match="no such directory"):
        load(tmp_path / "model.safetensors")


def test_a_gguf_file_missing_in_its_directory_is_named(tiny_model: Path) -> None:
    with pytest.raises(MissingError, match=r"q4\.gguf is missing"):
        load(tiny_model, gguf_file="q4.gguf")


def test_a_gguf_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no such thing" * 10)
    with pytest.raises(MissingError, match=r"model\.gguf: cannot be loaded"):
        load(tmp_path / "model.gguf")


def test_a_hub_id_without_a_network_fails_soon(pomona: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"instruction": "i", "output": "o"}\n')
    started = time.monotonic()
    done = pomona("ifd-score", "in.jsonl", "--model", "nobody/nothing", env={"HF_HOME": str(tmp_path / "hf")})
    assert time.monotonic() - started < 20
    error, hint = done.stderr.decode().splitlines()
    assert done.returncode == 5 and done.stdout == b""
    assert "model nobody/nothing: cannot be loaded" in error and "local copy" in hint


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def forbidding_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `peft` that fails the test when it is asked to load anything."""

    class PeftModel:
        @staticmethod
        def from_pretrained(*args: Any, **options: Any) -> None:
            raise AssertionError("loaded")

    module = types.ModuleType("peft")
    module.PeftModel = PeftModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "peft", module)


@pytest.mark.usefixtures("forbidding_peft")
def test_an_adapter_that_is_not_there_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"adapter_config\.json is missing"):
        load(tiny_model, adapter=tmp_path / "none")


@pytest.mark.usefixtures("forbidding_peft")
def test_an_adapter_with_pickled_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(MissingError, match=r"adapter_model.safetensors is missing \(pickles are not loaded\)"):
        load(tiny_model, adapter=tmp_path)
    assert not trap.exists()


def test_an_adapter_without_peft_says_what_to_install(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UnavailableError, match="peft") as caught:
        load(tiny_model, adapter=tmp_path)
    assert caught.value.hint == "pip install 'pomona[merge]'" and caught.value.exit_code == 7


def test_an_adapter_is_merged_into_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    """A low-rank adapter written by hand: W + (alpha / r) B A on every value projection."""
    pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "target_modules": ["v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    parts = {}
    for n, layer in enumerate(plain.model.layers):
        a, b = torch.randn(2, 32) * 0.3, torch.randn(16, 2) * 0.3
        stem = f"base_model.model.model.layers.{n}.self_attn.v_proj"
        parts |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        layer.self_attn.v_proj.weight.data += 3.0 * b @ a
    save_file(parts, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        expected = forward_nll(plain(torch.tensor([IDS])).logits[0], IDS)
    scorer, bare = load(tiny_model, adapter=tmp_path), load(tiny_model)
    assert measured(scorer) == pytest.approx(expected, rel=1e-5)
    assert abs(measured(bare) - expected) > 1e-3
    assert scorer.identity["revision"] == bare.identity["revision"] and scorer.identity["adapter"]


# --- a model of any kind ---------------------------------------------------------------------------------------------


def load_any(name: str | Path) -> Any:
    return load_model(str(name), Runtime(None, torch.device("cpu"), torch.float32, "a test", 1))


def test_a_model_of_any_kind_is_loaded_as_its_configuration_says(tiny_model: Path) -> None:
    causal, encoder = load_any(tiny_model), load_any("minilm")
    assert type(causal.model).__name__ == "LlamaForCausalLM" and type(encoder.model).__name__ == "BertModel"
    assert not causal.model.training and not any(p.requires_grad for p in encoder.model.parameters())
    assert encoder.tokenizer("pear")["input_ids"] and encoder.identity["model"] == "minilm"


def test_a_model_without_a_tokenizer_is_still_a_model(copied: Path) -> None:
    without_words(copied)
    assert load_any(copied).tokenizer is None


@pytest.mark.parametrize("named", ["pipeline", "NoSuchModel", "AutoTokenizer", "os"])
def test_a_class_that_is_no_model_is_refused(named: str, copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "architectures": [named]}))
    with pytest.raises(MissingError, match="no model class"):
        load_any(copied)


def test_a_model_that_would_be_in_part_random_is_refused(copied: Path) -> None:
    without_a_weight(copied)
    with pytest.raises(MissingError, match=r"1 weights are missing, among them model.layers.1.mlp.up_proj.weight"):
        load_any(copied)


def test_a_tokenizer_without_words_is_none(tmp_path: Path) -> None:
    from tiny import save_tiny_bert

    folder = save_tiny_bert(tmp_path / "bert")
    runtime = Runtime(None, torch.device("cpu"), torch.float32, "a test", 1)
    assert len(load_model(str(folder), runtime).tokenizer) == 5 + 2 * 36
    for file in [*folder.glob("tokenizer*"), folder / "vocab.txt"]:
        file.unlink(missing_ok=True)
    assert load_model(str(folder), runtime).tokenizer is None
    with pytest.raises(MissingError, match="its tokenizer has no vocabulary"):
        load_tokenizer(str(folder))
