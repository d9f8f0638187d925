"""Whole models: a fresh conversion changes nothing, files come back, and nobody loads them by mistake (A7, A10)."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from methods.meo_convert.tinies import DENSE, ENCODERS, MIXTURES, inputs, stir, tiny
from pomona.errors import UnavailableError
from pomona.methods.meo_convert import modeling_meo as meo
from pomona.models import embedded

IDS = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(0))


def block(name: str, **more: Any) -> dict[str, Any]:
    scope = "sequence" if name in ENCODERS else "prompt"
    return {"experts": 4, "selected": 1 if name == "switch_transformers" else 2, "scope": scope, **more}


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs(model, IDS)).logits
    return found


@pytest.mark.parametrize("run_as", ["meo", "moe"])
@pytest.mark.parametrize("level", ["sequence", "token", "task"])
@pytest.mark.parametrize("name", DENSE)
def test_a_fresh_conversion_of_a_dense_model_changes_no_output(name: str, level: str, run_as: str) -> None:
    model = tiny(name)
    before = outputs(model)
    model = meo.install(model, block(name, level=level, run_as=run_as, selected=3, task_tokens=[3, 9]))
    torch.testing.assert_close(outputs(model), before, atol=1e-5, rtol=0)
    with torch.no_grad():  # one expert alone is noticed, so the maps are indeed used
        for module in model.modules():
            if isinstance(module, meo.MergedLinear):
                module.weight[1].add_(0.1)
    assert (outputs(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("level", ["sequence", "token", "task"])
@pytest.mark.parametrize("name", DENSE)
def test_tensors_have_the_names_and_shapes_that_are_told(name: str, level: str) -> None:
    model = tiny(name)
    plain = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    modules = [key for key, _ in model.named_modules()]
    maps = meo.maps(model.config.model_type, modules)
    per_layer = 3 if name in ("t5 gated", "llama", "mistral", "qwen2", "qwen3") else 2
    assert len(maps) == per_layer * (4 if model.config.is_encoder_decoder else 2)
    expected = dict(plain)
    for map_ in maps:
        shape = plain[f"{map_}.weight"]
        f, d = shape[::-1] if name == "gpt2" else shape
        expected[f"{map_}.weight"] = (4, f, d)
        if f"{map_}.bias" in plain:
            expected[f"{map_}.bias"] = (4, f)
        if map_.endswith("up_proj"):
            continue
        m = 8 if level == "task" else d
        expected |= {f"{map_}.gate.weight": (4, m), f"{map_}.gate.noise": (4, m)}
        if level == "token":
            expected |= {f"{map_}.token.down.weight": (d // 16, d), f"{map_}.token.down.bias": (d // 16,)}
            expected |= {f"{map_}.token.up.weight": (d, d // 16), f"{map_}.token.up.bias": (d,)}
        if level == "task":
            expected |= {f"{map_}.task.embedding.weight": (2, 128), f"{map_}.task.reduce.weight": (8, 128)}
            expected |= {f"{map_}.task.reduce.bias": (8,)}
    model = meo.install(model, block(name, level=level, task_tokens=[3, 9, 3], token_reduction=16))
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == expected
    settings = meo.Settings.read(model.config.meo)
    added = meo.additions(settings, 16).state_dict()
    first = next(iter(maps))
    of_first = {key.removeprefix(f"{first}."): tuple(t.shape) for key, t in model.state_dict().items() if first in key}
    assert {key: tuple(t.shape) for key, t in added.items()}.items() <= of_first.items()


@pytest.mark.parametrize(
    ("name", "level"),
    [(name, level) for name in [*DENSE, *MIXTURES] for level in ("sequence", "token")]
    + [(name, "task") for name in DENSE],
)
def test_a_saved_model_comes_back_bit_for_bit(name: str, level: str, tmp_path: Path) -> None:
    model = meo.install(tiny(name), block(name, level=level, task_tokens=[3, 9], note="left alone"))
    stir(model)
    model.save_pretrained(tmp_path / "once")
    base = getattr(transformers, (DENSE | MIXTURES)[name][0])
    again, info = meo.converted_class(base).from_pretrained(tmp_path / "once", output_loading_info=True)
    assert not any(info.values())
    for parameter in again.parameters():  # from the file's map, where they lie too crooked for the same kernels
        parameter.data = parameter.data.clone()
    assert torch.equal(outputs(again.eval()), outputs(model))
    again.save_pretrained(tmp_path / "twice")
    for file in ("model.safetensors", "config.json", "modeling_meo.py"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()
    config = json.loads((tmp_path / "once/config.json").read_bytes())
    assert config["meo"]["note"] == "left alone" and config["architectures"] == [base.__name__]
    if name not in MIXTURES:
        written = load_file(tmp_path / "once/model.safetensors")
        assert {key for key, tensor in written.items() if tensor.dim() == 3} == {
            f"{map_}.weight" for map_ in meo.maps(model.config.model_type, dict(model.named_modules()))
        }


_FRESH = """
import sys, torch, transformers
for folder, auto in zip(sys.argv[1::2], sys.argv[2::2]):
    model, info = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert "pomona" not in sys.modules and not any(info.values()), info
    ids = torch.load(folder + "/ids.pt")
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    with torch.no_grad():
        torch.save(model.eval()(**given)[0], folder + "/out.pt")
    if model.can_generate():
        torch.save(model.generate(ids, max_new_tokens=4, do_sample=False), folder + "/said.pt")
    model.save_pretrained(folder + "/again")
"""


def test_the_written_code_alone_computes_the_same(tmp_path: Path) -> None:
    cases = {
        "bert": ("AutoModelForMaskedLM", "token"),
        "bart": ("AutoModelForSeq2SeqLM", "sequence"),
        "llama": ("AutoModelForCausalLM", "task"),
        "qwen2_moe": ("AutoModelForCausalLM", "sequence"),
    }
    arguments = []
    for name, (auto, level) in cases.items():
        model = meo.install(tiny(name), block(name, level=level, task_tokens=[3, 9]))
        stir(model)
        model.save_pretrained(tmp_path / name)
        torch.save(IDS, tmp_path / name / "ids.pt")
        arguments += [str(tmp_path / name), auto]
    done = subprocess.run(
        [sys.executable, "-c", _FRESH, *arguments],
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for name in cases:
        folder = tmp_path / name
        base = getattr(transformers, (DENSE | MIXTURES)[name][0])
        model = meo.converted_class(base).from_pretrained(folder)
        torch.testing.assert_close(torch.load(folder / "out.pt"), outputs(model), atol=1e-6, rtol=1e-6)
        if name != "bert":
            assert torch.equal(torch.load(folder / "said.pt"), model.generate(IDS, max_new_tokens=4, do_sample=False))
        for file in ("model.safetensors", "config.json", "modeling_meo.py"):
            assert (folder / file).read_bytes() == (folder / "again" / file).read_bytes()


@pytest.mark.parametrize("name", DENSE)
def test_plain_transformers_refuses_to_load_experts_as_if_they_were_dense(name: str, tmp_path: Path) -> None:
    meo.install(tiny(name), block(name)).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        getattr(transformers, DENSE[name][0]).from_pretrained(tmp_path, trust_remote_code=False)


def test_heads_get_their_auto_classes(tmp_path: Path) -> None:
    model = meo.install(tiny("bert", head="BertForSequenceClassification", num_labels=3), block("bert"))
    assert set(meo.auto_map(model.config)) == {
        "AutoModel",
        "AutoModelForMaskedLM",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelForQuestionAnswering",
    }
    model.save_pretrained(tmp_path)
    bare = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(bare).__name__ == "BertModel"
    with torch.no_grad():
        torch.testing.assert_close(bare(IDS)[0], model.bert(IDS)[0], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"level": "paragraph"}, "meo.level is 'paragraph'"),
        ({"run_as": "dense"}, "meo.run_as is 'dense'"),
        ({"compat": "yes"}, "meo.compat"),
        ({"mass": "some"}, "meo.mass"),
        ({"selected": 9}, "meo.selected is 9"),
        ({"selected": 0}, "meo.selected is 0"),
        ({"token_reduction": 0}, "meo.token_reduction is 0"),
        ({"selected": "2"}, "meo.selected is '2'"),
        ({"experts": 4.0}, "meo.experts is 4.0"),
        ({"experts": None}, "meo.experts is None"),
        ({"level": "task"}, "meo.task_tokens is empty"),
        ({"level": "task", "task_tokens": "ab"}, "meo.task_tokens is 'ab'"),
        ({"level": ["task"]}, "meo.level is"),
        ({"scope": None}, "meo.scope is None"),
        ({"scope": "segment:0"}, "meo.scope is 'segment:0'"),
        ({"scope": "paragraph"}, "meo.scope is 'paragraph'"),
    ],
)
def test_blocks_that_say_nothing_known_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        meo.install(tiny("bert"), {"experts": 4, **given})


def test_models_that_cannot_be_converted_are_refused() -> None:
    with pytest.raises(ValueError, match="type electra cannot be upcycled"):
        meo.install(transformers.ElectraModel(transformers.ElectraConfig(num_hidden_layers=1)), {})
    with pytest.raises(ValueError, match="merged experts already"):
        meo.install(meo.install(tiny("bert"), {}), {})
    with pytest.raises(ValueError, match='no block "meo"'):
        meo.converted_class(transformers.BertForMaskedLM)(tiny("bert").config)
    with pytest.raises(ValueError, match="chunk_size_feed_forward"):
        meo.install(tiny("bert", chunk_size_feed_forward=2), {})
    with pytest.raises(ValueError, match=r"meo\.experts is 8, but model\.layers\.0\.mlp has 4"):
        meo.install(tiny("mixtral"), {"scope": "prompt"})
    with pytest.raises(ValueError, match="no gate for the task level"):
        meo.install(tiny("mixtral"), {"experts": 4, "level": "task", "task_tokens": [1]})


def test_a_checkpoint_that_lacks_part_of_a_gate_is_refused(tmp_path: Path) -> None:
    meo.install(tiny("bert"), block("bert")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.gate.noise"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense\.gate\.noise is missing"):
        meo.converted_class(transformers.BertForMaskedLM).from_pretrained(tmp_path)


def test_a_mixture_gains_token_blocks_that_do_nothing_yet(tmp_path: Path) -> None:
    source = tiny("olmoe")
    source.config.meo = block("olmoe", level="token")
    source.save_pretrained(tmp_path)
    model = meo.converted_class(transformers.OlmoeForCausalLM).from_pretrained(tmp_path).eval()
    assert sum(isinstance(module, meo.TokenBlock) for module in model.modules()) == 2
    expected = outputs(meo.install(source, block("olmoe")))
    torch.testing.assert_close(outputs(model), expected, atol=1e-6, rtol=1e-6)


def test_the_released_code_has_no_biases_in_bert_and_bart() -> None:
    for name in DENSE:
        model = meo.install(tiny(name), block(name, compat="reference"))
        kept = any(module.bias is not None for module in model.modules() if isinstance(module, meo.MergedLinear))
        assert kept == (name in ("roberta", "gpt2", "llama"))


def test_a_checkpoint_without_experts_is_refused(tmp_path: Path) -> None:
    model = tiny("bert")
    model.config.meo = {"experts": 4}
    model.save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError)):
        meo.converted_class(transformers.BertForMaskedLM).from_pretrained(tmp_path)


def test_a_copy_of_a_model_has_gates_of_its_own() -> None:
    model = meo.install(tiny("llama"), block("llama"))
    stir(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = outputs(other)
        for module in model.modules():
            if isinstance(module, meo.MergedLinear):
                module.weight.zero_()
        with meo.prompted(model, 5):
            assert torch.equal(outputs(other), expected)


def sentences(model: Any, texts: list[str]) -> torch.Tensor:
    """Sentence vectors of all-MiniLM-L6-v2: the normalised mean of the last hidden states."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.minilm())
    given = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**given).last_hidden_state
    mask = given["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


TEXTS = ["A graft joins two plants.", "The scion takes to the stock if both are cut cleanly and bound at once.", "No."]


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_minilm_upcycled_has_the_sentence_vectors_it_had(level: str) -> None:
    try:
        folder = embedded.minilm()
    except UnavailableError as error:
        pytest.skip(str(error))
    found = {}
    for compat in ("none", "reference"):
        model = transformers.BertModel.from_pretrained(folder).eval()
        if compat == "none":
            before = sentences(model, TEXTS)
        model = meo.install(model, {"level": level, "experts": 8, "selected": 2, "compat": compat})
        found[compat] = sentences(model, TEXTS)
        if compat == "none":
            stir(model, scale=0.1)
            together = sentences(model, TEXTS)
            for at, text in enumerate(TEXTS):
                torch.testing.assert_close(sentences(model, [text])[0], together[at], atol=1e-5, rtol=0)
            assert (together - before).abs().max() > 1e-3
    torch.testing.assert_close(found["none"], before, atol=1e-5, rtol=0)
    assert (found["reference"] - before).abs().max() > 1e-2  # without biases
