"""FLOPs of a forward pass, in closed form and as torch counts them.

Only matrix products count, a multiplication and an addition as two, and attention scores in full, also where a mask
hides half of them. The figures MEO is known by, 28.5 G for BERT-base and 72.0 G with four experts mixed, follow from
this with the masked-LM head and 128 tokens. Gates put before a dense model's maps are left out, as they are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pomona.errors import DataError, UsageError
from pomona.models.drift import evaluating

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "switch_transformers")
FAMILIES = ("bert", "roberta", "gpt2", "t5", "bart", *LLAMA_LIKE, *MIXTURES)

Map = tuple[int, int]  # widths of a linear map, in and out
Head = Literal["language", "classification", "tokens", "none"]


@dataclass(frozen=True)
class Flops:
    """FLOPs in all, and of each part: projections, scores, feed-forward, shared, router, merge, blocks, head."""

    total: int
    parts: Mapping[str, int]


@dataclass(frozen=True)
class _Layer:
    """What decides a layer's FLOPs.

    Attributes:
        width: of the hidden states, d.
        queries, keys: width of all query heads, and of all key heads.
        maps: linear maps of the feed-forward network, or of one expert.
        experts: in a mixture; 0 of a dense layer.
        shared: linear maps of experts that every token passes, with their gate.
        cross: it attends to an encoder as well.
    """

    width: int
    queries: int
    keys: int
    maps: tuple[Map, ...]
    experts: int = 0
    shared: tuple[Map, ...] = ()
    cross: bool = False

    @property
    def inputs(self) -> tuple[int, ...]:
        """Widths of what the maps see, once for maps that see the same."""
        return tuple(dict.fromkeys(width for width, _ in self.maps))


def forward(
    config: Any,
    tokens: int,
    *,
    experts: int | None = None,
    merged: bool = False,
    head: bool = True,
    token_reduction: int | None = None,
) -> Flops:
    """FLOPs of one sequence of `tokens` tokens, as many in a decoder as in its encoder.

    Args:
        config: of one of `FAMILIES`.
        experts: how many each token passes, k: of a mixture by default its own; a dense model given k becomes a mixture
            of k experts in every feed-forward network. Switch has one, and tokens above its capacity are counted too.
        merged: the k experts are merged once for the sequence and passed once (MEO). A merge of P weights costs 2 k P,
            a multiplication and an addition each; half of it where a multiply-add is one operation.
        head: with the head that ``config.architectures`` names, a language-model head where it names none.
        token_reduction: with a token-level block before the maps, whose bottleneck is this many times narrower.

    Raises:
        UsageError: `tokens`, `experts` or `token_reduction` is below 1.
        DataError: an unknown family or head.
    """
    for name, value in (("tokens", tokens), ("experts", experts), ("token_reduction", token_reduction)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be 1 or more")
    layers = _layers(config)
    mixture = any(layer.experts for layer in layers)
    selected = experts or (_selected(config) if mixture else 1)
    parts = dict.fromkeys(("projections", "scores", "feed-forward", "shared", "router", "merge", "blocks", "head"), 0)
    for layer in layers:
        converted = bool(layer.experts) or not mixture
        passes = selected if converted and not merged else 1
        weights = _weights(layer.maps)
        attentions = 1 + layer.cross
        parts["projections"] += attentions * 4 * tokens * layer.width * (layer.queries + layer.keys)
        parts["scores"] += attentions * 4 * tokens**2 * layer.queries
        parts["feed-forward"] += 2 * tokens * weights * passes
        parts["shared"] += 2 * tokens * _weights(layer.shared)
        parts["router"] += 2 * (1 if merged else tokens) * layer.width * layer.experts
        if merged and converted:
            parts["merge"] += 2 * selected * weights
        if token_reduction and converted:
            parts["blocks"] += sum(4 * tokens * width * max(1, width // token_reduction) for width in layer.inputs)
    parts["head"] = _head(config, tokens) if head else 0
    return Flops(sum(parts.values()), parts)


@torch.no_grad()
def counted(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """FLOPs of ``model(**inputs)`` by torch's counter.

    Attention and experts run eagerly meanwhile: the counter knows nothing of grouped products, and would count no
    experts at all in the way that transformers runs them by default.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(_eager(model))
        counter = stack.enter_context(FlopCounterMode(display=False))
        model(**inputs)
        return int(counter.get_total_flops())


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    names = ("_attn_implementation", "_experts_implementation")
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = [
        (config, name, getattr(config, name)) for config in configs.values() for name in names if hasattr(config, name)
    ]
    try:
        for config, name, _ in before:
            setattr(config, name, "eager")
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)


# --- families --------------------------------------------------------------------------------------------------------


def _weights(maps: tuple[Map, ...]) -> int:
    return sum(width * out for width, out in maps)


def _selected(config: Any) -> int:
    return 1 if config.model_type == "switch_transformers" else int(config.num_experts_per_tok)


def _layers(config: Any) -> list[_Layer]:
    kind = config.model_type
    if kind in ("bert", "roberta"):
        d, f = config.hidden_size, config.intermediate_size
        return [_Layer(d, d, d, ((d, f), (f, d)))] * config.num_hidden_layers
    if kind == "gpt2":
        d = config.n_embd
        f = config.n_inner or 4 * d
        return [_Layer(d, d, d, ((d, f), (f, d)))] * config.n_layer
    if kind == "bart":
        d, f, g = config.d_model, config.encoder_ffn_dim, config.decoder_ffn_dim
        encoder = [_Layer(d, d, d, ((d, f), (f, d)))] * config.encoder_layers
        return encoder + [_Layer(d, d, d, ((d, g), (g, d)), cross=True)] * config.decoder_layers
    if kind in ("t5", "switch_transformers"):
        alone = _architecture(config).endswith(("EncoderModel", "ForTokenClassification"))  # its encoder
        return [*_t5(config, decoder=False), *([] if alone else _t5(config, decoder=True))]
    if kind in LLAMA_LIKE or kind in MIXTURES:
        return [_llama(config, place) for place in range(config.num_hidden_layers)]
    raise DataError(f"no closed form of FLOPs for models of type {kind}", hint=f"known: {', '.join(FAMILIES)}")


def _t5(config: Any, *, decoder: bool) -> Iterator[_Layer]:
    d, f, heads = config.d_model, config.d_ff, config.num_heads * config.d_kv
    gated = config.model_type == "t5" and config.is_gated_act
    maps = ((d, f), *[(d, f)] * gated, (f, d))
    step = 0
    if config.model_type == "switch_transformers":
        step = config.decoder_sparse_step if decoder else config.encoder_sparse_step
    for place in range(config.num_decoder_layers if decoder else config.num_layers):
        sparse = step == 1 or (step > 1 and place % step == 1)
        yield _Layer(d, heads, heads, maps, config.num_experts if sparse else 0, cross=decoder)


def _llama(config: Any, place: int) -> _Layer:
    """Of a decoder with gated maps: dense, or a mixture in the layers that its config says."""
    d, f = config.hidden_size, config.intermediate_size
    width = getattr(config, "head_dim", None) or d // config.num_attention_heads
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    experts = 0
    shared: tuple[Map, ...] = ()
    if config.model_type in MIXTURES and _sparse(config, place):
        experts = config.num_local_experts if config.model_type == "mixtral" else config.num_experts
        f = getattr(config, "moe_intermediate_size", f)
        if config.model_type == "qwen2_moe":
            shared = (*_gated(d, config.shared_expert_intermediate_size), (d, 1))
    return _Layer(d, queries, keys, _gated(d, f), experts, shared)


def _gated(width: int, inner: int) -> tuple[Map, ...]:
    return (width, inner), (width, inner), (inner, width)


def _sparse(config: Any, place: int) -> bool:
    if not config.model_type.startswith("qwen"):
        return True
    return (
        place not in config.mlp_only_layers and config.num_experts > 0 and (place + 1) % config.decoder_sparse_step == 0
    )


# --- heads -----------------------------------------------------------------------------------------------------------


def _head(config: Any, tokens: int) -> int:
    d, vocabulary, classes = int(config.hidden_size), int(config.vocab_size), int(config.num_labels)
    bidirectional = config.model_type in ("bert", "roberta")
    pooler = 2 * d * d  # of one token, the first
    match _head_kind(config):
        case "language":
            return 2 * tokens * d * (vocabulary + d * bidirectional)
        case "classification" if bidirectional or config.is_encoder_decoder:
            return pooler + 2 * d * classes  # what is no pooler by name is a map of that size
        case "classification" | "tokens":
            return 2 * tokens * d * classes
        case _:
            return pooler * bidirectional


def _architecture(config: Any) -> str:
    return str(next(iter(config.architectures or ()), "LMHeadModel"))


def _head_kind(config: Any) -> Head:
    name = _architecture(config)
    endings: dict[str, Head] = {
        "LMHeadModel": "language",
        "ForCausalLM": "language",
        "ForMaskedLM": "language",
        "ForConditionalGeneration": "language",
        "ForSequenceClassification": "classification",
        "ForTokenClassification": "tokens",
        "Model": "none",
    }
    found = next((head for ending, head in endings.items() if name.endswith(ending)), None)
    if found is None:
        raise DataError(f"no closed form of FLOPs for the head of {name}", hint="count without the head")
    return found
