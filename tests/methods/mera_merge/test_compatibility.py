"""Adapters whose parameters do not stand for the same thing are refused, by the field that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.mera_merge.adapterhub import make_bottleneck, make_ia3, make_lora
from pomona.errors import DataError, UsageError
from pomona.methods.mera_merge.adapters import read
from pomona.methods.mera_merge.compatibility import check

BOTTLENECK_AT = "bert.encoder.layer.0.output.adapters.task"
LORA_AT = "base_model.model.encoder.layer.0.attention.self"


def checked(*made: Path, allow_resize: bool = False) -> None:
    check([read(str(folder), allow_pickle=False) for folder in made], allow_resize=allow_resize)


def refused(*made: Path, said: str, allow_resize: bool = False) -> None:
    with pytest.raises(DataError, match=said) as caught:
        checked(*made, allow_resize=allow_resize)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("make", [make_bottleneck, make_lora, make_ia3])
def test_adapters_of_one_kind_agree(make: Callable[..., Path], tmp_path: Path) -> None:
    checked(*(make(tmp_path / str(seed), seed=seed) for seed in range(3)))


def test_kinds_are_not_mixed(tmp_path: Path) -> None:
    made = [make(tmp_path / make.__name__, seed=1) for make in (make_bottleneck, make_lora, make_ia3)]
    refused(made[0], made[1], said="kind differs: 'bottleneck' in make_bottleneck, 'lora' in make_lora")
    refused(made[1], made[2], said="kind differs: 'lora' in make_lora, 'ia3' in make_ia3")


def test_labels_tell_adapters_apart(tmp_path: Path) -> None:
    for parent in "ab":
        make_bottleneck(tmp_path / parent / "sst", seed=1)
    with pytest.raises(UsageError, match="several adapters are called sst") as caught:
        checked(tmp_path / "a/sst", tmp_path / "b/sst")
    assert caught.value.hint == "tell them apart by NAME=PATH"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"non_linearity": "gelu"}, "non_linearity differs: 'relu' in a, 'gelu' in b"),
        ({"model_name": "tiny/roberta"}, "model_name differs: 'tiny/bert' in a, 'tiny/roberta' in b"),
        ({"model_type": "roberta"}, "model_type differs: 'bert' in a, 'roberta' in b"),
        ({"hidden_size": 16}, "hidden_size differs: 8 in a, 16 in b"),
        ({"scaling": 4.0}, r"scaling differs: 1\.0 in a, 4\.0 in b"),
        ({"is_parallel": True}, "is_parallel differs: False in a, True in b"),
        ({"mh_adapter": True}, "mh_adapter differs"),
        ({"cross_adapter": True}, "cross_adapter differs"),
        ({"original_ln_before": False}, "original_ln_before differs"),
        ({"original_ln_after": False}, "original_ln_after differs"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln differs: True in a, 'post_add' in b"),
        ({"adapter_residual_before_ln": True}, "adapter_residual_before_ln differs"),
        ({"layers": 3}, r"layers differ: b has encoder\.layer\.2\.output, a has not"),
        ({"width": 16, "hidden_size": None}, r"width of encoder\.layer\.0\.output differs: 8 in a, 16 in b"),
        ({"rank": 4}, r"reduction_factor \(units of encoder\.layer\.0\.output\) differs: 3 in a, 4 in b"),
    ],
)
def test_bottlenecks_that_differ_are_refused_by_the_field(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    refused(make_bottleneck(tmp_path / "a", seed=1), make_bottleneck(tmp_path / "b", seed=2, **changed), said=said)


def test_a_third_adapter_is_held_against_the_first(tmp_path: Path) -> None:
    made = [make_bottleneck(tmp_path / name, seed=1) for name in "ab"]
    refused(*made, make_bottleneck(tmp_path / "c", seed=1, non_linearity="swish"), said="'relu' in a, 'swish' in c")


def test_unequal_numbers_of_units_may_be_allowed(tmp_path: Path) -> None:
    made = [make_bottleneck(tmp_path / str(rank), seed=1, rank=rank) for rank in (3, 4)]
    checked(*made, allow_resize=True)
    wide = make_bottleneck(tmp_path / "wide", seed=1, width=16, hidden_size=None)
    refused(made[0], wide, said="width", allow_resize=True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"scaling": "learned"}, "scaling is 'learned'"),
        ({"ln_after": True}, "ln_after is set"),
        ({"use_gating": True}, "use_gating is set"),
        ({"phm_layer": True}, "phm_layer is set"),
        (
            {"tensors": {f"{BOTTLENECK_AT}.gate.weight": torch.ones(1, 8)}},
            r"task\.gate\.weight belongs to no bottleneck",
        ),
        ({"tensors": {"bert.invertible_adapters.task.F.0.weight": torch.ones(2)}}, "belongs to no bottleneck"),
    ],
)
def test_parameters_that_no_method_merges_are_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    made = [make_bottleneck(tmp_path / name, seed=1, **changed) for name in "ab"]
    refused(*made, said=said)
    checked(made[0])  # alone it is copied


def test_layer_norms_before_the_projection_are_refused(tmp_path: Path) -> None:
    second = {}
    for layer in (0, 1):
        at = f"bert.encoder.layer.{layer}.output.adapters.task.adapter_down.1"
        second |= {f"{at}.weight": torch.ones(3, 8), f"{at}.bias": torch.ones(3)}
    made = [make_bottleneck(tmp_path / name, seed=1, tensors=second, ln_before=True) for name in "ab"]
    refused(*made, said="adapter a: ln_before is set: it has layer norms of its own")


def test_the_same_settings_written_otherwise_agree(tmp_path: Path) -> None:
    """Names of activations in capitals, settings left out where they are the defaults, a hub id without its owner."""
    first = make_bottleneck(tmp_path / "a", seed=1, non_linearity="ReLU", model_name="google-bert/bert-base-uncased")
    other = make_bottleneck(tmp_path / "b", seed=1, model_name="bert-base-uncased", is_parallel=None, hidden_size=None)
    checked(first, other, make_bottleneck(tmp_path / "c", seed=1, model_name=""))


@pytest.mark.parametrize(
    ("one", "other"),
    [("a/bert", "b/bert"), ("bert", "roberta"), ("/models/a/final", "/models/b/final"), ("x/bert", "ber")],
)
def test_names_of_different_base_models_differ(one: str, other: str, tmp_path: Path) -> None:
    made = [make_bottleneck(tmp_path / name, seed=1, model_name=base) for name, base in (("a", one), ("b", other))]
    refused(*made, said="model_name differs")
    made = [
        make_lora(tmp_path / name, seed=1, base_model_name_or_path=base) for name, base in (("c", one), ("d", other))
    ]
    refused(*made, said="base_model_name_or_path differs")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fan_in_fan_out": True}, "fan_in_fan_out differs"),
        ({"task_type": "CAUSAL_LM"}, "task_type differs: None in a, 'CAUSAL_LM' in b"),
        (
            {"targets": ("query", "key")},
            r"target_modules differ: b has encoder\.layer\.0\.attention\.self\.key, a has not",
        ),
        ({"layers": 3}, r"target_modules differ: b has encoder\.layer\.2"),
        ({"width": 16}, r"shape of encoder\.layer\.0\.attention\.self\.query differs: \(8, 8\) in a, \(16, 16\) in b"),
    ],
)
def test_loras_that_differ_are_refused_by_the_field(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    refused(make_lora(tmp_path / "a", seed=1), make_lora(tmp_path / "b", seed=2, **changed), said=said)


def test_revisions_of_the_base_model_differ_only_where_both_are_known(tmp_path: Path) -> None:
    made = [make_lora(tmp_path / str(rev), seed=1, revision=rev) for rev in (None, "main", "v2")]
    checked(made[0], made[1])
    refused(made[1], made[2], said="revision differs: 'main' in main, 'v2' in v2")


@pytest.mark.parametrize(
    "changed",
    [
        {"use_dora": True},
        {"use_qalora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"trainable_token_indices": [1, 2]},
        {"layer_replication": [[0, 2]]},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"alora_invocation_tokens": [1]},
        {"megatron_config": {"x": 1}},
        {"kasa_config": {"beta": 0.1}},
        {"use_bdlora": {"nblocks": 2}},
        {"arrow_config": {"top_k": 3}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "pissa_niter_16"},
        {"a_field_of_the_future": True},
    ],
)
def test_loras_that_are_more_than_low_rank_are_refused_by_the_field(changed: dict[str, Any], tmp_path: Path) -> None:
    made = [make_lora(tmp_path / name, seed=1, **changed) for name in "ab"]
    refused(*made, said=f"adapter a: {next(iter(changed))} is")
    checked(made[0])


@pytest.mark.parametrize(
    "name", ["base_model.model.embeddings.word_embeddings.weight", f"{LORA_AT}.query.lora_magnitude_vector"]
)
def test_tensors_that_are_no_factors_are_refused_by_name(name: str, tmp_path: Path) -> None:
    made = [make_lora(tmp_path / where, seed=1, tensors={name: torch.ones(8)}) for where in "ab"]
    refused(*made, said=f"adapter a: {name} is no low-rank factor")


def test_what_a_merge_accounts_for_may_differ(tmp_path: Path) -> None:
    checked(
        make_lora(tmp_path / "a", seed=1),
        make_lora(tmp_path / "b", seed=1, rank=4, lora_alpha=7, use_rslora=True, lora_dropout=0.1, peft_version="0.9"),
        make_lora(tmp_path / "c", seed=1, lora_bias=True, rank_pattern={"query": 3}, init_lora_weights="gaussian"),
    )


def test_ia3_on_the_input_of_a_map_is_not_that_on_its_output(tmp_path: Path) -> None:
    name = "base_model.model.encoder.layer.0.attention.self.key.ia3_l"
    made = [make_ia3(tmp_path / where, seed=1) for where in "ab"]
    tensors = load_file(made[1] / "adapter_model.safetensors")
    save_file({**tensors, name: tensors[name].T.contiguous()}, made[1] / "adapter_model.safetensors")
    refused(*made, said=r"self\.key differs: \(8, 1\) in a, \(1, 8\) in b")
