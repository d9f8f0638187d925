"""Adapters inside a base model: outputs are those of the package `adapters`, and nothing is guessed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from methods.mera_merge import bases
from methods.mera_merge.adapterhub import make_bottleneck, make_lora
from methods.mera_merge.elsewhere import run
from pomona.errors import DataError
from pomona.methods.mera_merge.adapters import Adapter, read
from pomona.methods.mera_merge.bottleneck import attach, layers, placement
from pomona.methods.mera_merge.fusion_layer import FusionLayer, attach_fused

FUSED = ("seq_bn", "double_seq_bn")


def states(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=bases.TOKENS, attention_mask=bases.MASK).last_hidden_state
    return found


def adapted(folder: Path, case: str) -> Tensor:
    model = bases.base(bases.CASES[case][0])
    with attach(model, read(str(bases.adapter(folder, case)), allow_pickle=False)):
        return states(model)


def fused(folder: Path, case: str) -> Tensor:
    model = bases.base(bases.CASES[case][0])
    pair = [
        read(str(bases.adapter(folder / name, case, seed=seed, name=name)), allow_pickle=False)
        for seed, name in ((1, "one"), (2, "two"))
    ]
    with attach_fused(model, pair, torch.Generator()) as attached:
        given = bases.fusion(list(attached.changes))
        for site, layer in attached.changes.items():
            assert isinstance(layer, FusionLayer)
            for name in ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight"):
                layer.get_parameter(name).data.copy_(given[f"{site}.{name}"])
        return states(model)


@pytest.mark.parametrize("case", bases.CASES)
def test_outputs_are_those_that_adapters_gave(tmp_path: Path, case: str) -> None:
    expected = torch.tensor(bases.golden()[case])
    found = adapted(tmp_path / "task", case)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - states(bases.base(bases.CASES[case][0]))).abs().max() > 0.1, "the adapter is felt"


@pytest.mark.parametrize("case", FUSED)
def test_fused_outputs_are_those_that_adapters_gave(tmp_path: Path, case: str) -> None:
    expected = torch.tensor(bases.golden()[f"fused {case}"])
    torch.testing.assert_close(fused(tmp_path, case), expected, atol=1e-5, rtol=0)


def reference(folder: Path) -> Mapping[str, Any]:
    """What `adapters` computes now, by case."""
    work = []
    for case, (family, _) in bases.CASES.items():
        at = folder / case.replace(" ", "-")
        bases.base(family).save_pretrained(at / "model")
        entry = {"name": case, "model": str(at / "model"), "adapters": [str(bases.adapter(at / "task", case))]}
        entry |= {"fusion": None, "tokens": bases.TOKENS.tolist(), "mask": bases.MASK.tolist()}
        work.append(entry)
        if case in FUSED:
            sites = list(read(str(at / "task"), allow_pickle=False).sites())
            save_file(bases.fusion(sites), at / "fusion.safetensors")
            pair = [
                str(bases.adapter(at / name, case, seed=seed, name=name)) for seed, name in ((1, "one"), (2, "two"))
            ]
            work.append({**entry, "name": f"fused {case}", "adapters": pair, "fusion": str(at / "fusion.safetensors")})
    (folder / "work.json").write_text(json.dumps(work))
    script = (Path(__file__).parent / "adapters_reference.py").read_text()
    found: Mapping[str, Any] = run(script, folder / "work.json")
    return found


@pytest.mark.slow
def test_outputs_are_those_that_adapters_gives_now(tmp_path: Path) -> None:
    found = reference(tmp_path)
    if os.environ.get("POMONA_WRITE_GOLDEN"):
        rounded = {case: [[[round(x, 7) for x in t] for t in s] for s in values] for case, values in found.items()}
        (Path(__file__).parent / "golden_bottleneck.json").write_text(json.dumps(rounded, indent=None) + "\n")
    for case in bases.CASES:
        ours = adapted(tmp_path / "ours" / case.replace(" ", "-"), case)
        torch.testing.assert_close(ours, torch.tensor(found[case]), atol=1e-5, rtol=0)
    for case in FUSED:
        ours = fused(tmp_path / "ours-fused" / case, case)
        torch.testing.assert_close(ours, torch.tensor(found[f"fused {case}"]), atol=1e-5, rtol=0)


def test_a_removed_adapter_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = bases.base("bert")
    before, names = states(model), list(model.state_dict())
    with attach(model, read(str(bases.adapter(tmp_path / "a", "double_seq_bn")), allow_pickle=False)):
        assert not torch.equal(states(model), before)
    assert torch.equal(states(model), before)
    assert list(model.state_dict()) == names


def test_what_was_attached_is_given_back_bit_for_bit(tmp_path: Path) -> None:
    adapter = read(str(bases.adapter(tmp_path / "a", "double_seq_bn")), allow_pickle=False)
    with attach(bases.base("bert"), adapter) as attached:
        found = attached.sites()
    given = adapter.sites()
    assert set(found) == set(given)
    for site, values in given.items():
        for part in ("down", "down_bias", "up", "up_bias"):
            assert torch.equal(getattr(found[site], part), getattr(values, part))


def loaded(folder: Path, **settings: Any) -> Adapter:
    return read(str(make_bottleneck(folder / "task", seed=0, **settings)), allow_pickle=False)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("use_gating", True),
        ("inv_adapter", "nice"),
        ("cross_adapter", True),
        ("stochastic_depth", 0.1),
        ("scaling", "learned"),
        ("residual_before_ln", "later"),
        ("non_linearity", "wavelet"),
        ("some_new_flag", True),
        ("ln_after", True),
    ],
)
def test_what_is_not_computed_is_refused_by_the_name_of_its_flag(tmp_path: Path, flag: str, value: Any) -> None:
    with pytest.raises(DataError, match=rf"adapter task: {flag} is {value!r}"):
        placement(loaded(tmp_path, **{flag: value}))


def test_a_sum_after_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="residual_before_ln is 'post_add'"):
        placement(loaded(tmp_path, residual_before_ln="post_add", original_ln_before=False))


def test_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="adapter low: it is of kind lora"):
        attach(bases.base("bert"), read(str(make_lora(tmp_path / "low", seed=0)), allow_pickle=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 3}, "it has tensors for the feed-forward map of layer 2, but the base model has 2 layers"),
        ({"layers": 1}, "it has nothing for the feed-forward map of layer 1, which its configuration names"),
        ({"width": 4}, "encoder.layer.0.output has width 4, the base model 8"),
        ({"leave_out": [1]}, "it has tensors for .* layer 1, but its configuration does not name it"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    model = bases.base("bert")
    with pytest.raises(DataError, match=message):
        attach(model, loaded(tmp_path, **settings))
    assert torch.equal(states(model), states(bases.base("bert")))


def test_another_family_is_refused() -> None:
    class Other:
        class config:
            model_type = "gpt2"

    with pytest.raises(DataError, match="of type gpt2") as caught:
        layers(Other())
    assert caught.value.hint is not None and "roberta" in caught.value.hint
