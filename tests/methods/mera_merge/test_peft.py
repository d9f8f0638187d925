"""PEFT loads what we write, and computes with it what the merged ΔW says; its own merges are the reference."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel

from pomona.methods.mera_merge import lowrank
from pomona.methods.mera_merge.adapters import Adapter, read, write
from pomona.methods.mera_merge.compatibility import check

peft = pytest.importorskip("peft", reason="the package peft (extra merge) is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TOKENS = torch.tensor([[5, 9, 13, 7, 7, 2, 31, 40]])


def bert(**config: Any) -> BertModel:
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(**size, intermediate_size=32, **config)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


def saved(folder: Path, base: nn.Module, config: Any, seed: int) -> Path:
    """An adapter as PEFT makes and saves it, its parameters normal."""
    model = peft.get_peft_model(copy.deepcopy(base), config)
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "ia3_l" in name:
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.2 + ("ia3_l" in name)
    with warnings.catch_warnings(action="ignore"):  # embeddings are saved whole, it says
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result = model(input_ids=TOKENS)
    return torch.as_tensor(result["logits"] if "logits" in result else result["last_hidden_state"]).double()


def loaded(base: nn.Module, adapter: Adapter, folder: Path) -> Tensor:
    """Outputs of the base with `adapter`, written by us and loaded by PEFT; nothing may be missing or left over."""
    write(folder, adapter)
    with warnings.catch_warnings(action="error"):
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    state = model.load_adapter(folder, adapter_name="again")
    assert not state.unexpected_keys and not [key for key in state.missing_keys if "again" in key]
    return out(model.eval())


def added(base: nn.Module, folders: list[Path], weights: list[float]) -> Tensor:
    """Outputs of the base with Σ wᵢ ΔWᵢ in its weights, each ΔW as PEFT merges it."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for folder, weight in zip(folders, weights, strict=True):
            merged = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload()
            pairs = zip(model.parameters(), merged.parameters(), base.parameters(), strict=True)
            for own, theirs, plain in pairs:
                own += weight * (theirs - plain)
    return out(model)


def opened(*folders: Path) -> list[Adapter]:
    adapters = [read(str(folder), allow_pickle=False) for folder in folders]
    check(adapters, allow_resize=False)
    return adapters


LORAS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (bert, {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 5}),
    "rslora": (bert, {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 5, "use_rslora": True}),
    "bias": (bert, {"target_modules": ["query", "output.dense"], "r": 3, "lora_bias": True}),
    "patterns": (
        bert,
        {
            "target_modules": "all-linear",
            "r": 3,
            "lora_alpha": 5,
            "rank_pattern": {"query": 2, "layer.1.output.dense": 4},
            "alpha_pattern": {"layer.0.attention.self.key": 9},
        },
    ),
    "embedding": (bert, {"target_modules": ["word_embeddings", "key"], "r": 3, "lora_alpha": 5}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc"], "r": 3, "lora_alpha": 5, "fan_in_fan_out": True}),
    "some layers": (bert, {"target_modules": ["value"], "r": 3, "layers_to_transform": [1]}),
    "one type": (bert, {"target_modules": ["value"], "r": 3, "task_type": "FEATURE_EXTRACTION"}),
}


@pytest.mark.parametrize("name", LORAS)
def test_merged_loras_load_and_compute_the_weighted_sum(name: str, tmp_path: Path) -> None:
    make, config = LORAS[name]
    base = make()
    folders = [saved(tmp_path / str(seed), base, peft.LoraConfig(**config), seed) for seed in (1, 2)]
    weights = [0.7, -0.4]
    adapters = opened(*folders)
    truth = added(base, folders, weights)
    plain = out(base)
    assert (truth - plain).abs().max() > 0.01
    assert (loaded(base, lowrank.delta_cat(adapters, weights), tmp_path / "cat") - truth).abs().max() < 2e-6
    merged, residual = lowrank.delta_svd(adapters, weights, 8)
    assert max(residual.values()) < 1e-6
    assert (loaded(base, merged, tmp_path / "svd") - truth).abs().max() < 2e-6


@pytest.mark.parametrize("name", [*LORAS, "dora"])
def test_one_lora_is_read_and_written_as_peft_saved_it(name: str, tmp_path: Path) -> None:
    """Where PEFT's own merge of one adapter, weight 1, loses rsLoRA, lora_bias and DoRA without a word (B9)."""
    make, config = LORAS.get(name, (bert, {"target_modules": ["query"], "use_dora": True}))
    base = make()
    folder = saved(tmp_path / "a", base, peft.LoraConfig(**config), 1)
    [adapter] = opened(folder)
    merged = lowrank.delta_svd([adapter], [1.0])[0]
    truth = out(peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval())
    assert torch.equal(loaded(base, merged, tmp_path / "b"), truth)
    for path in folder.glob("adapter_*"):
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


def test_sums_of_factors_are_those_of_peft(tmp_path: Path) -> None:
    base = bert()
    config = {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 5}
    folders = [saved(tmp_path / str(seed), base, peft.LoraConfig(**config), seed) for seed in (1, 2)]
    adapters, weights = opened(*folders), [0.7, -0.4]
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folders[0], adapter_name="1")
    model.load_adapter(folders[1], adapter_name="2")
    for kind, ours in (("linear", lowrank.linear(adapters, weights)), ("cat", lowrank.delta_cat(adapters, weights))):
        model.add_weighted_adapter(["1", "2"], weights, kind, combination_type=kind)
        model.set_adapter(kind)
        assert (loaded(base, ours, tmp_path / kind) - out(model.eval())).abs().max() < 1e-6
    cross = lowrank.deviation(lowrank.linear(adapters, weights), adapters, weights)
    assert min(cross.values()) > 0.5 and max(cross.values()) < 2


def test_ranks_of_two_rslora_merge_with_their_own_scales(tmp_path: Path) -> None:
    base = bert()
    made = [
        saved(tmp_path / str(rank), base, peft.LoraConfig(target_modules=["value"], r=rank, use_rslora=root), rank)
        for rank, root in ((2, True), (5, False))
    ]
    adapters = opened(*made)
    scale = {"2": 8 / math.sqrt(2), "5": 8 / 5}
    for adapter in adapters:
        assert lowrank.factors(adapter)["encoder.layer.0.attention.self.value"].scale == scale[adapter.label]
    merged = lowrank.delta_cat(adapters, [0.5, 0.5])
    assert (loaded(base, merged, tmp_path / "out") - added(base, made, [0.5, 0.5])).abs().max() < 2e-6


def test_ia3_loads_and_scales_by_the_weighted_sum(tmp_path: Path) -> None:
    base = bert()
    targets = {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}
    config = peft.IA3Config(**targets)
    folders = [saved(tmp_path / str(seed), base, config, seed) for seed in (1, 2)]
    merged = lowrank.ia3_average(opened(*folders), [0.3, 0.7])
    found = loaded(base, merged, tmp_path / "out")
    expected = copy.deepcopy(base)
    with torch.no_grad():
        parts = [
            peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload().state_dict()
            for folder in folders
        ]
        for name, tensor in expected.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(0.3 * parts[0][name] + 0.7 * parts[1][name])
    assert (found - out(expected)).abs().max() < 2e-6 < (found - out(base)).abs().max()


def test_a_classifier_may_be_kept_or_dropped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = BertForSequenceClassification(bert().config).eval()
    config = peft.LoraConfig(target_modules=["query"], r=3, task_type="SEQ_CLS")
    folder = saved(tmp_path / "a", base, config, 1)
    [adapter] = opened(folder)
    assert {name.rpartition("classifier.")[2] for name in adapter.head} == {"weight", "bias"}
    truth = out(peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval())
    assert torch.equal(loaded(base, adapter, tmp_path / "kept"), truth)
    bare = Adapter(adapter.label, folder, "lora", adapter.config, adapter.tensors)
    assert torch.equal(loaded(base, bare, tmp_path / "dropped"), truth)  # the head was saved as it was in the base
