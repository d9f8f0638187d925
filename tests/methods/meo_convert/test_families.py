"""Experts are found in either layout, all of them, or the model is refused with the tensor's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from methods.meo_convert import mixtures
from pomona.errors import DataError, MissingError, PomonaError
from pomona.methods.meo_convert.expert_alignment import part
from pomona.methods.meo_convert.families import natural, recognise
from pomona.models import embedded
from pomona.models.checkpoint import Checkpoint

COUNTS = {"mixtral": (4, 2, True), "switch_transformers": (4, 1, False)}


@pytest.mark.parametrize("family", mixtures.FAMILIES)
def test_a_mixture_is_known_with_its_experts_in_order(family: str, tmp_path: Path) -> None:
    model = mixtures.make(family)
    checkpoint = Checkpoint.open(mixtures.save(model, tmp_path))
    found = recognise(checkpoint)
    experts, selected, normalised = COUNTS.get(family, (4, 2, False))
    assert (found.name, found.kind, found.layout) == (family, "mixture", "per-expert")
    assert (found.experts, found.selected, found.normalised) == (experts, selected, normalised)
    names = ["encoder.1", "encoder.3", "decoder.1", "decoder.3"] if family == "switch_transformers" else ["0", "1"]
    assert [layer.name for layer in found.layers] == names
    expected = iter(mixtures.stacks(model))
    for layer in found.layers:
        first, last = next(expected), next(expected)
        for expert in range(experts):
            maps = {role: part(checkpoint, parts[expert]) for role, parts in layer.maps.items()}
            rows = torch.cat([maps["gate"], maps["up"]]) if "gate" in maps else maps["up"]
            assert torch.equal(rows, first[expert]) and torch.equal(maps["down"], last[expert])


@pytest.mark.parametrize("family", mixtures.DECODERS)
def test_packed_experts_are_the_same_experts(family: str, tmp_path: Path) -> None:
    model = mixtures.make(family)
    apart = Checkpoint.open(mixtures.save(model, tmp_path / "apart"))
    packed = Checkpoint.open(mixtures.save_packed(model, tmp_path / "packed"))
    one, other = recognise(apart), recognise(packed)
    assert (one.layout, other.layout) == ("per-expert", "packed")
    for left, right in zip(one.layers, other.layers, strict=True):
        assert left.name == right.name and left.maps.keys() == right.maps.keys()
        for role, parts in left.maps.items():
            for mine, theirs in zip(parts, right.maps[role], strict=True):
                assert torch.equal(part(apart, mine), part(packed, theirs))


def test_only_the_layers_that_the_configuration_makes_sparse_have_experts(tmp_path: Path) -> None:
    model = mixtures.make("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[1], decoder_sparse_step=1)
    assert [layer.name for layer in recognise(Checkpoint.open(mixtures.save(model, tmp_path / "a"))).layers] == list(
        "023"
    )
    model = mixtures.make("qwen2_moe", num_hidden_layers=4, decoder_sparse_step=2)
    assert [layer.name for layer in recognise(Checkpoint.open(mixtures.save(model, tmp_path / "b"))).layers] == list(
        "13"
    )


def test_layers_past_nine_stay_in_order() -> None:
    names = [f"model.layers.{n}.mlp" for n in (10, 9, 2, 100)]
    assert sorted(names, key=natural) == [f"model.layers.{n}.mlp" for n in (2, 9, 10, 100)]


# --- what is refused -------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: mixtures.changed(folder, lambda tensors: tensors.pop(name))


def reconfigured(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def one_layer_packed(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        block = "model.layers.1.block_sparse_moe.experts"
        w1, w3, w2 = ([tensors.pop(f"{block}.{n}.{w}.weight") for n in range(4)] for w in ("w1", "w3", "w2"))
        rows = [torch.cat(pair) for pair in zip(w1, w3, strict=True)]
        tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.stack(rows)
        tensors["model.layers.1.mlp.experts.down_proj"] = torch.stack(w2)

    mixtures.changed(folder, change)


def with_a_scale(folder: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight_scale"
    mixtures.changed(folder, lambda tensors: tensors.update({name: torch.ones(1)}))


def in_integers(folder: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    mixtures.changed(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))


def of_another_width(folder: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    mixtures.changed(folder, lambda tensors: tensors.update({name: tensors[name][:, :-1].clone()}))


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (
            without("model.layers.1.block_sparse_moe.experts.2.w3.weight"),
            MissingError,
            r"1\.block_.*experts\.2\.w3.*is m",
        ),
        (
            without("model.layers.0.block_sparse_moe.gate.weight"),
            MissingError,
            r"0\.block_sparse_moe\.gate\.weight is m",
        ),
        (one_layer_packed, MissingError, "layer 1 are packed in one tensor, those of layer 0"),
        (reconfigured(num_local_experts=5), MissingError, r"experts\.4\.w1\.weight is missing"),
        (reconfigured(num_local_experts=3), DataError, r"experts\.3\.w1\.weight belongs to no expert"),
        (reconfigured(num_hidden_layers=3), MissingError, r"model\.layers\.2\.block_sparse_moe\.experts\.0\.w1"),
        (reconfigured(num_hidden_layers=1), DataError, "layer 1 has experts, but config.json makes it a dense one"),
        (reconfigured(num_experts_per_tok=9), DataError, "selects 9 of 4 experts"),
        (reconfigured(num_local_experts="many"), DataError, "config.json is not one of mixtral"),
        (reconfigured(model_type="phimoe"), DataError, "model_type is 'phimoe', which is not known"),
        (reconfigured(quantization_config={"bits": 4}), DataError, "it is quantised"),
        (with_a_scale, DataError, r"experts\.2\.w1\.weight_scale belongs to no expert"),
        (in_integers, DataError, r"experts\.2\.w1\.weight has the number format I8"),
        (of_another_width, DataError, r"experts\.2\.w2\.weight has the shape \[16, 23\], not \[16, 24\]"),
    ],
)
def test_a_model_that_is_not_whole_is_refused_by_name(
    damage: Callable[[Path], Any], kind: type[PomonaError], message: str, tmp_path: Path
) -> None:
    folder = mixtures.save(mixtures.make("mixtral"), tmp_path)
    damage(folder)
    with pytest.raises(kind, match=message) as caught:
        recognise(Checkpoint.open(folder))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("lost", ["gate_up_proj", "down_proj"])
def test_a_missing_packed_tensor_is_named(lost: str, tmp_path: Path) -> None:
    folder = mixtures.save_packed(mixtures.make("olmoe"), tmp_path)
    mixtures.changed(folder, lambda tensors: tensors.pop(f"model.layers.1.mlp.experts.{lost}"))
    with pytest.raises(MissingError, match=rf"model\.layers\.1\.mlp\.experts\.{lost} is missing"):
        recognise(Checkpoint.open(folder))


# --- dense models ----------------------------------------------------------------------------------------------------


def test_the_feed_forward_maps_of_minilm_are_found() -> None:
    found = recognise(Checkpoint.open(embedded.minilm()))
    assert (found.name, found.kind, found.experts) == ("bert", "dense", 1)
    names = [f"encoder.layer.{n}.{half}.dense" for n in range(6) for half in ("intermediate", "output")]
    assert [linear.name for linear in found.linears] == names
    assert all(linear.bias and not linear.transposed for linear in found.linears)


DENSE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gpt2": ({"n_embd": 8, "n_head": 2, "n_layer": 2, "vocab_size": 20}, ["mlp.c_fc", "mlp.c_proj"]),
    "t5": (
        {"d_model": 8, "d_ff": 12, "d_kv": 4, "num_heads": 2, "num_layers": 1, "vocab_size": 20},
        ["DenseReluDense.wi", "DenseReluDense.wo"] * 2,
    ),
    "bart": (
        {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20},
        ["fc1", "fc2"] * 2,
    ),
    "llama": (
        {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20},
        ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"],
    ),
}


@pytest.mark.parametrize("family", DENSE)
def test_the_feed_forward_maps_of_each_dense_family_are_found(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    values, leaves = DENSE[family]
    AutoModel.from_config(AutoConfig.for_model(family, **values)).save_pretrained(tmp_path)
    linears = recognise(Checkpoint.open(tmp_path)).linears
    layers = 2 if family == "gpt2" else 1
    for linear, leaf in zip(linears, leaves * layers, strict=True):
        assert linear.name.endswith(leaf)
        assert linear.bias == (family in ("gpt2", "bart")) and linear.transposed == (family == "gpt2")


def test_stacked_weights_without_a_word_of_how_they_were_made_are_refused(tmp_path: Path) -> None:
    tensors = load_file(embedded.minilm() / "model.safetensors")
    name = "encoder.layer.3.output.dense.weight"
    save_file(tensors | {name: torch.stack([tensors[name]] * 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((embedded.minilm() / "config.json").read_text())
    with pytest.raises(DataError, match=r"3\.output\.dense\.weight has 3 axes"):
        recognise(Checkpoint.open(tmp_path))
