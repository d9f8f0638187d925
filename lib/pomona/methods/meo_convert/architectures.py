"""What model a static merge makes: the same family with one expert, or the dense family whose graph is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pomona.errors import UsageError
from pomona.methods.meo_convert.families import Family, resolved
from pomona.methods.meo_convert.layouts import ExpertLayer, Role
from pomona.models.checkpoint import Checkpoint

Arch = Literal["single-expert", "dense-twin"]

UNLIMITED = 2**31 - 1
"""Tokens that Switch's one expert takes: with several, those past a capacity are passed over; none is to be now."""

_TWINS = {
    "mixtral": ("mistral", "Mixtral", "Mistral"),
    "qwen3_moe": ("qwen3", "Qwen3Moe", "Qwen3"),
    "switch_transformers": ("t5", "SwitchTransformers", "T5"),
}
_OF_EXPERTS = (
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
    "encoder_sparse_step",
    "num_sparse_encoder_layers",
    "num_sparse_decoder_layers",
    "mlp_only_layers",
    "norm_topk_prob",
    "output_router_logits",
    "expert_capacity",
    "add_router_probs",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_jitter_noise",
    "router_bias",
    "router_dtype",
    "router_ignore_padding_tokens",
    "dense_act_fn",
)


def choose(checkpoint: Checkpoint, family: Family, arch: str) -> Arch:
    """What `arch` (auto, single-expert, dense-twin) means for this model; auto takes the twin where there is one.

    Raises:
        UsageError: there is no such architecture; the hint says which there is.
    """
    if family.kind == "dense":
        raise UsageError(f"{family.name} has no experts to merge", hint="--level sequence makes some of a dense model")
    if family.kind == "meo":
        if arch == "single-expert":
            raise UsageError("--arch single-expert: a converted model has no such family", hint="use --arch dense-twin")
        return "dense-twin"
    lacking = obstacle(checkpoint, family)
    if arch == "dense-twin" and lacking is not None:
        raise UsageError(f"--arch dense-twin: {lacking}", hint="use --arch single-expert")
    return "single-expert" if arch == "single-expert" or lacking is not None else "dense-twin"


def obstacle(checkpoint: Checkpoint, family: Family) -> str | None:
    """Why a mixture has no dense twin that computes the same, None if it has one."""
    if family.name == "olmoe":
        return "no dense family has OLMoE's graph (norms over all heads of queries and keys)"
    if family.name == "qwen2_moe":
        return "Qwen2-MoE's shared expert has a gate of its own, which no dense family has"
    config = resolved(checkpoint.config)
    if family.name == "switch_transformers" and not config.tie_word_embeddings:
        return "T5 ties its embeddings, this model does not"
    if family.name == "qwen3_moe" and len(family.layers) < config.num_hidden_layers:
        width = family.layers[0].maps["up"][0].shape[0]
        if config.intermediate_size != width:
            return f"its dense layers are {config.intermediate_size} wide, its experts {width}; a twin has one width"
    return None


def name(family: Family, layer: ExpertLayer, role: Role, arch: Arch) -> str:
    """The tensor that holds the merged map `role` of `layer`."""
    if family.kind == "meo":
        return f"{layer.name}.{role}"
    if arch == "single-expert":
        return f"{family.naming.canonical(layer.block)}.{family.naming.within(0, role)}"
    if family.name == "switch_transformers":
        return renamed(family, f"{layer.block}.{family.naming.leaves[role]}.weight", arch)
    return f"{layer.block.rpartition('.')[0]}.mlp.{role}_proj.weight"


def router_name(family: Family, layer: ExpertLayer, tensor: str) -> str:
    """What a router's tensor is called beside a single expert."""
    return f"{family.naming.canonical(layer.block)}{tensor.removeprefix(layer.block)}"


def renamed(family: Family, tensor: str, arch: Arch) -> str:
    """What a tensor that is copied is called in the output."""
    if family.name == "switch_transformers" and arch == "dense-twin" and (place := family.naming.place.match(tensor)):
        return f"{place['stem']}.DenseReluDense{tensor[place.end() :]}"
    return tensor


def configuration(checkpoint: Checkpoint, family: Family, arch: Arch, dtype: str) -> dict[str, Any]:
    """config.json of the output.

    Args:
        dtype: "source", or what the numbers are converted to.
    """
    config = {key: value for key, value in checkpoint.config.items() if key != "meo"}
    if "meo" in checkpoint.config:  # only then is the code that it points to ours
        config.pop("auto_map", None)
        config["architectures"] = [kind.removeprefix("Meo") for kind in config.get("architectures") or []]
    if dtype != "source":
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if family.kind == "meo":
        return config
    return _single(family, config) if arch == "single-expert" else _twin(family, config)


def _single(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    count = "num_local_experts" if family.name == "mixtral" or "num_local_experts" in config else "num_experts"
    if family.name == "switch_transformers":
        return {**config, count: 1, "expert_capacity": UNLIMITED}
    return {**config, count: 1, "num_experts_per_tok": 1}


def _twin(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """What the two families leave unsaid differs (Mistral has a sliding window, Mixtral none), so it is said."""
    kind, ours, theirs = _TWINS[family.name]
    whole = resolved(config)
    found = {key: value for key, value in config.items() if key not in _OF_EXPERTS}
    found["model_type"] = kind
    found["architectures"] = [f"{theirs}{n.removeprefix(ours)}" for n in config.get("architectures") or []]
    if family.name == "switch_transformers":
        found["feed_forward_proj"] = whole.dense_act_fn
    if family.name == "qwen3_moe":
        found["intermediate_size"] = family.layers[0].maps["up"][0].shape[0]
        found["head_dim"] = getattr(whole, "head_dim", None) or whole.hidden_size // whole.num_attention_heads
        windowed = whole.sliding_window is not None  # in all layers of the mixture, in some of a Qwen3 that is not told
        found["layer_types"] = ["sliding_attention" if windowed else "full_attention"] * whole.num_hidden_layers
    unsaid: Mapping[str, Any] = resolved({"model_type": kind}).to_dict()
    meant = whole.to_dict()
    return found | {
        key: meant[key] for key, value in unsaid.items() if key in meant and key not in found and meant[key] != value
    }
