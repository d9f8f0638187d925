"""What adapters cost: closed forms against torch's counter on models that they sit in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from methods.mera_merge import bases
from methods.mera_merge.adapterhub import make_bottleneck, make_ia3
from pomona.methods.mera_merge import costs, lowrank
from pomona.methods.mera_merge.adapters import Adapter, read
from pomona.methods.mera_merge.bottleneck import attach
from pomona.methods.mera_merge.fusion_layer import attach_fused


def opened(folder: Path) -> Adapter:
    return read(str(folder), allow_pickle=False)


def counted(model: Any, tokens: int) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(1, tokens, dtype=torch.long))
    return counter.get_total_flops()


def bottlenecks(folder: Path, ranks: Sequence[int], **more: Any) -> list[Adapter]:
    return [
        opened(make_bottleneck(folder / str(n), seed=n, rank=rank, layers=bases.LAYERS, width=bases.WIDTH, **more))
        for n, rank in enumerate(ranks)
    ]


@pytest.mark.parametrize("more", [{}, bases.DOUBLE])
@pytest.mark.parametrize("tokens", [1, 13])
def test_a_bottleneck_costs_what_torch_counts(tmp_path: Path, more: dict[str, Any], tokens: int) -> None:
    (adapter,) = bottlenecks(tmp_path, [5], **more)
    model = bases.base("bert")
    plain = counted(model, tokens)
    with attach(model, adapter):
        assert counted(model, tokens) - plain == costs.operations(adapter, tokens) > 0


@pytest.mark.parametrize("ranks", [(3, 3), (2, 3, 4), (1, 2, 3, 4, 5)])
def test_adapters_side_by_side_cost_what_torch_counts_of_adapterfusion(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    adapters = bottlenecks(tmp_path, ranks)
    model = bases.base("bert")
    plain = counted(model, 7)
    with attach_fused(model, adapters, torch.Generator()):
        assert counted(model, 7) - plain == costs.composed(adapters, 7)


def test_one_adapter_side_by_side_with_none_needs_no_fusion(tmp_path: Path) -> None:
    adapters = bottlenecks(tmp_path, [3])
    assert costs.composed(adapters, 9) == costs.operations(adapters[0], 9)
    assert costs.table(adapters, adapters[0])["128"] == {
        "before": costs.operations(adapters[0], 128),
        "after": costs.operations(adapters[0], 128),
    }


def lora(model_folder: Path, folder: Path, **config: Any) -> tuple[Any, Any]:
    """The plain model, and the one with a LoRA that is saved to `folder` too."""
    made = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), peft.LoraConfig(**config))
    made.save_pretrained(folder, save_embedding_layers=False)
    return AutoModelForCausalLM.from_pretrained(model_folder).eval(), made.eval()


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
        {"r": 3, "target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["plain", "ranks", "embedding"],
)
def test_a_lora_costs_what_torch_counts(tmp_path: Path, tiny_model: Path, config: dict[str, Any]) -> None:
    plain, adapted = lora(tiny_model, tmp_path / "lora", **config)
    adapter = opened(tmp_path / "lora")
    assert counted(adapted, 11) - counted(plain, 11) == costs.operations(adapter, 11) > 0


def test_the_bias_of_a_lora_is_no_product(tmp_path: Path, tiny_model: Path) -> None:
    config: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"]}
    for name, bias in (("without", False), ("with", True)):
        lora(tiny_model, tmp_path / name, **config, lora_bias=bias)
    without, biased = opened(tmp_path / "without"), opened(tmp_path / "with")
    assert costs.parameters(biased) == costs.parameters(without) + 2 * 32
    assert costs.operations(biased, 5) == costs.operations(without, 5)


def test_a_merged_lora_costs_its_new_rank(tmp_path: Path, tiny_model: Path) -> None:
    adapters = []
    for name, rank in (("one", 2), ("two", 3)):
        lora(tiny_model, tmp_path / name, r=rank, target_modules=["q_proj"])
        adapters.append(opened(tmp_path / name))
    found = costs.table(adapters, lowrank.delta_cat(adapters, [0.5, 0.5]))
    # two layers, 32 to 32: 2 S r (in + out)
    assert found["512"] == {"before": 2 * 2 * 512 * (2 + 3) * 64, "after": 2 * 2 * 512 * 5 * 64}


def test_an_ia3_costs_one_product_for_each_number(tmp_path: Path) -> None:
    adapter = opened(make_ia3(tmp_path / "scales", seed=1, layers=2, width=8))
    assert costs.parameters(adapter) == 2 * (8 + 8 + 16)
    assert costs.operations(adapter, 10) == 10 * 2 * (8 + 8 + 16)
    assert costs.composed([adapter, adapter], 10) == 2 * costs.operations(adapter, 10)


def test_parameters_leave_the_head_out(tmp_path: Path) -> None:
    plain = opened(make_bottleneck(tmp_path / "plain", seed=1))
    headed = opened(make_bottleneck(tmp_path / "headed", seed=1, labels=3))
    assert headed.head and costs.parameters(headed) == costs.parameters(plain) == 2 * (3 * 8 + 3 + 8 * 3 + 8)
