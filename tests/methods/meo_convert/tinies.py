"""Models of every family, a few thousand parameters each, and the parts of a converted one by themselves."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pomona.methods.meo_convert import modeling_meo as meo

_SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_LLAMA = _SHAPE | {"num_key_value_heads": 2}
_EXPERTS = _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}
_T5 = {
    "vocab_size": 50,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_BART = {"vocab_size": 50, "d_model": 16} | {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 2), ("ffn_dim", 32), ("attention_heads", 2))
}

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", _SHAPE),
    "roberta": ("RobertaForMaskedLM", _SHAPE),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "t5": ("T5ForConditionalGeneration", _T5),
    "t5 gated": ("T5ForConditionalGeneration", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", _BART),
    "llama": ("LlamaForCausalLM", _LLAMA | {"mlp_bias": True}),
    "mistral": ("MistralForCausalLM", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", _LLAMA | {"head_dim": 8}),
}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", _LLAMA | {"num_local_experts": 4}),
    "olmoe": ("OlmoeForCausalLM", _EXPERTS),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        _EXPERTS | {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _EXPERTS | {"moe_intermediate_size": 8, "head_dim": 8}),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        _T5
        | {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4},
    ),
}
ENCODERS = ("bert", "roberta")


def tiny(name: str, *, seed: int = 0, head: str | None = None, **changed: Any) -> Any:
    """A model called `name` above in evaluation mode, all its parameters random; `head` is another class for it."""
    kind, shape = (DENSE | MIXTURES)[name]
    base = getattr(transformers, head or kind)
    torch.manual_seed(seed)
    settings = {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None, **shape, **changed}
    model = base(base.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(model: Any, ids: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
    """What a forward pass over `ids` takes; a decoder behind an encoder gets them too."""
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
        if mask is not None:
            given["decoder_attention_mask"] = mask
    return given


def stir(model: nn.Module, *, seed: int = 1, scale: float = 1.0) -> None:
    """Give gates, token blocks and experts values of their own, as training would; routers of mixtures too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, meo.MergedLinear):
                module.weight.add_(torch.randn_like(module.weight) * 0.1 * scale)
                if module.bias is not None:
                    module.bias.add_(torch.randn_like(module.bias) * 0.1 * scale)
            if isinstance(module, meo.NoisyTopK):
                module.weight.copy_(torch.randn_like(module.weight) * scale)
            if isinstance(module, meo.TokenBlock):
                module.up.weight.copy_(torch.randn_like(module.up.weight) * 0.3 * scale)


def linear(
    inputs: int, outputs: int, *, bias: bool = True, seed: int = 0, causal: bool = False, **settings: Any
) -> meo.MergedLinear:
    """One map with random experts and gate, in evaluation mode, with a scene of its own."""
    torch.manual_seed(seed)
    chosen = meo.Settings(**settings)
    map_ = meo.MergedLinear(nn.Linear(inputs, outputs, bias=bias), chosen).eval()
    map_.scene, map_.name = meo.Scene(chosen, causal=causal, whole=False), "map"
    stir(map_, seed=seed)
    with torch.no_grad():
        map_.weight.copy_(torch.randn_like(map_.weight))
        if map_.bias is not None:
            map_.bias.copy_(torch.randn_like(map_.bias))
    return map_
