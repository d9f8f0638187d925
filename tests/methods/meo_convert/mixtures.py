"""Small mixtures of experts of every family, random but for what a test sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

DECODERS = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
FAMILIES = (*DECODERS, "switch_transformers")

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}
_OWN: dict[str, dict[str, Any]] = {
    "mixtral": _COMMON | {"num_local_experts": 4},
    "olmoe": _COMMON | {"num_experts": 4},
    "qwen2_moe": _COMMON
    | {"num_experts": 4, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28, "decoder_sparse_step": 1},
    "qwen3_moe": _COMMON | {"num_experts": 4, "moe_intermediate_size": 20, "head_dim": 12},
    "switch_transformers": {
        "vocab_size": 64,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_decoder_layers": 4,
        "num_sparse_decoder_layers": 2,
        "num_heads": 2,
        "num_experts": 4,
        "decoder_start_token_id": 0,
    },
}


def make(family: str, *, seed: int = 0, **config: Any) -> Any:
    """A random model of `family` in evaluation mode; its experts differ. A setting of None is left unsaid."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(seed)
    auto = AutoModelForSeq2SeqLM if family == "switch_transformers" else AutoModelForCausalLM
    said = {key: value for key, value in (_OWN[family] | config).items() if value is not None}
    return auto.from_config(AutoConfig.for_model(family, **said)).eval()


def stacks(model: Any) -> list[list[Tensor]]:
    """Of each map of each layer with experts, the matrices of the experts, as views that can be set."""
    found: list[list[Tensor]] = []
    for module in model.modules():
        kind = type(module).__name__
        if not kind.endswith("Experts"):
            continue
        if kind.startswith("Switch"):
            experts = list(module.values())
            found += [[expert.wi.weight.data for expert in experts], [expert.wo.weight.data for expert in experts]]
        else:
            found += [list(module.gate_up_proj.data), list(module.down_proj.data)]
    return found


def alike(model: Any) -> Any:
    """`model` with every expert a copy of the first of its layer."""
    for experts in stacks(model):
        for expert in experts[1:]:
            expert.copy_(experts[0])
    return model


def save(model: Any, folder: Path) -> Path:
    """As transformers saves it, experts apart."""
    model.save_pretrained(folder)
    return folder


def save_packed(model: Any, folder: Path) -> Path:
    """With the experts of a layer in one tensor, as the model holds them."""
    model.config.save_pretrained(folder)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors = {name: value for name, value in tensors.items() if not name.endswith("lm_head.weight")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = folder / "config.json"
    architectures = f'"architectures": ["{type(model).__name__}"],'
    config.write_text(config.read_text().replace("{", "{" + architectures, 1))
    return folder


def inputs(family: str, seed: int = 1, length: int = 24) -> dict[str, Tensor]:
    """Two texts of random tokens."""
    ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(seed))
    return (
        {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if family == "switch_transformers" else {"input_ids": ids}
    )


def logits(model: Any, family: str, length: int = 24) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs(family, length=length)).logits
    return found


def changed(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """The weights in `folder`, rewritten after `change`."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
