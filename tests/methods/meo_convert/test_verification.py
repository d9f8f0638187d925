"""Drift, perplexity and the error of every layer, against NumPy in double precision."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file

from methods.meo_convert import mixtures
from methods.meo_convert.conversions import TEXTS, go, report, sentences
from methods.meo_convert.upcycled import save_dense
from pomona.errors import MissingError
from pomona.methods.meo_convert.verification import QUICK
from small_bert import tokenizer

Array = NDArray[np.float64]


def logits(folder: Path, texts: tuple[str, ...], **how: Any) -> list[tuple[Array, list[int]]]:
    """Of each text by itself, without padding: logits (t, v), and its tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    words, found = tokenizer(), []
    for text in texts:
        ids = words(text)["input_ids"]
        with torch.no_grad():
            found.append((model(torch.tensor([ids])).logits[0].double().numpy(), ids))
    return found


def log_softmax(x: Array) -> Array:
    shifted = x - x.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def perplexity(outputs: list[tuple[Array, list[int]]]) -> float:
    nll = [-log_softmax(x)[place, ids[place + 1]] for x, ids in outputs for place in range(len(ids) - 1)]
    return math.exp(sum(nll) / len(nll))


@pytest.fixture
def olmoe(tmp_path: Path) -> Path:
    """Experts that drifted apart, gates that do not sum to 1."""
    model = mixtures.alike(mixtures.make("olmoe"))
    random = torch.Generator().manual_seed(0)
    for experts in mixtures.stacks(model):
        for expert in experts[1:]:
            expert.add_(torch.randn(expert.shape, generator=random) * 0.2 * expert.std())
    tokenizer().save_pretrained(tmp_path / "olmoe")
    return mixtures.save(model, tmp_path / "olmoe")


def test_drift_and_perplexity_are_those_of_each_text_by_itself(olmoe: Path, tmp_path: Path) -> None:
    calib = sentences(tmp_path / "calib.jsonl", *TEXTS)
    summary, _, _ = go(olmoe, tmp_path / "out", calib=calib, verify="full", max_drift=1.0)
    found = report(tmp_path / "out")["drift"]
    before, after = (logits(folder, TEXTS) for folder in (olmoe, tmp_path / "out"))
    x, y = (np.concatenate([rows for rows, _ in outputs]) for outputs in (before, after))
    p, q = log_softmax(x), log_softmax(y)
    assert found["relative"] == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-5)
    assert found["maximum"] == pytest.approx(np.abs(y - x).max(), rel=1e-4)
    assert found["divergence"] == pytest.approx(float((np.exp(p) * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found["agreement"] == pytest.approx(float((x.argmax(-1) == y.argmax(-1)).mean()), abs=1e-12)
    assert found["perplexity_before"] == pytest.approx(perplexity(before), rel=1e-5)
    assert found["perplexity_after"] == pytest.approx(perplexity(after), rel=1e-5)
    assert (found["texts"], found["tokens"]) == (len(TEXTS), sum(len(ids) for _, ids in before))
    assert summary["drift"]["relative"] == pytest.approx(found["relative"], rel=1e-5)
    assert summary["perplexity"]["after"] == pytest.approx(found["perplexity_after"], rel=1e-5)


def test_the_error_of_a_layer_is_of_its_experts_on_what_the_source_feeds_them(olmoe: Path, tmp_path: Path) -> None:
    calib = sentences(tmp_path / "calib.jsonl", *TEXTS)
    go(olmoe, tmp_path / "out", calib=calib, max_drift=1.0)
    found = report(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(olmoe).eval()
    seen: dict[int, list[tuple[Array, Array]]] = {0: [], 1: []}
    masses: dict[int, list[float]] = {0: [], 1: []}
    for place, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(
            lambda module, given, output, place=place: seen[place].append(
                (given[0][0].double().numpy(), (output[0] if isinstance(output, tuple) else output)[0].double().numpy())
            )
        )
    with torch.no_grad():
        for text in TEXTS:
            model(torch.tensor([tokenizer()(text)["input_ids"]]))
    tensors = {name: value.double().numpy() for name, value in load_file(olmoe / "model.safetensors").items()}
    for place in range(2):
        stem = f"model.layers.{place}.mlp"
        inputs, outputs = (np.concatenate(parts) for parts in zip(*seen[place], strict=True))
        scores = np.exp(log_softmax(inputs @ tensors[f"{stem}.gate.weight"].T))
        masses[place] = np.sort(scores, 1)[:, -2:].sum(1).tolist()
        mass = float(np.mean(masses[place]))
        gate, up, down = (
            np.mean([tensors[f"{stem}.experts.{n}.{role}_proj.weight"] for n in range(4)], 0)
            for role in ("gate", "up", "down")
        )
        hidden = inputs @ gate.T
        merged = (hidden / (1 + np.exp(-hidden)) * (inputs @ up.T)) @ (mass * down).T
        expected = np.linalg.norm(merged - outputs) / np.linalg.norm(outputs)
        assert found["mass"][str(place)] == pytest.approx(mass, rel=1e-5)
        assert found["layers"][str(place)] == pytest.approx(expected, rel=1e-4)
        chosen = np.argsort(scores, 1)[:, -2:]
        assert found["usage"][str(place)] == pytest.approx(np.bincount(chosen.ravel(), minlength=4) / chosen.size)


def test_cosines_are_the_mean_over_pairs_of_experts(olmoe: Path, tmp_path: Path) -> None:
    go(olmoe, tmp_path / "out", verify="none")
    tensors = {name: value.double().numpy() for name, value in load_file(olmoe / "model.safetensors").items()}
    for place, found in report(tmp_path / "out")["cosine"].items():
        flat = [
            np.concatenate(
                [
                    tensors[f"model.layers.{place}.mlp.experts.{n}.{r}_proj.weight"].ravel()
                    for r in ("gate", "up", "down")
                ]
            )
            for n in range(4)
        ]
        unit = np.array([each / np.linalg.norm(each) for each in flat])
        assert found == pytest.approx(float((unit @ unit.T)[np.triu_indices(4, 1)].mean()), rel=1e-5)


def test_what_the_gates_of_a_decoder_see_is_no_later_token(tmp_path: Path) -> None:
    """The perplexity of a mixture kept at the scope prompt is what the code beside it says of each text."""
    tokenizer().save_pretrained(tmp_path / "source")
    mixtures.save(mixtures.make("mixtral"), tmp_path / "source")
    calib = sentences(tmp_path / "calib.jsonl", *TEXTS)
    go(tmp_path / "source", tmp_path / "out", level="sequence", calib=calib, max_drift=2.0)
    found = report(tmp_path / "out")
    after = logits(tmp_path / "out", TEXTS, trust_remote_code=True)
    assert found["drift"]["perplexity_after"] == pytest.approx(perplexity(after), rel=1e-5)
    cut = [(x[:3], ids[:3]) for x, ids in after]
    alone = [
        logits(tmp_path / "out", (text,), trust_remote_code=True)[0][0][:3]
        for text in (" ".join(text.split()[:2]) for text in TEXTS)
    ]  # [CLS] and two words: the same logits with nothing behind them
    for (x, _), y in zip(cut, alone, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    assert found["unprompted"] and "first token alone" in (tmp_path / "out/report.md").read_text()


def test_quick_looks_at_a_few_texts_and_full_at_all(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "gpt2", "gpt2")
    calib = sentences(tmp_path / "calib.jsonl", *TEXTS, *(f"{text} the film" for text in TEXTS))
    for how, texts in (("quick", QUICK), ("full", 2 * len(TEXTS))):
        go(source, tmp_path / how, verify=how, calib=calib)
        assert report(tmp_path / how)["drift"]["texts"] == texts
    go(source, tmp_path / "few", verify="full", calib=calib, calib_samples=3)
    assert report(tmp_path / "few")["drift"]["texts"] == 3
    go(source, tmp_path / "none", verify="none", calib=calib)
    found = report(tmp_path / "none")
    assert found["drift"] is None and found["layers"] == {} and not (tmp_path / "none/figures").exists()


def test_a_model_that_transformers_cannot_make_is_named_by_its_own_directory(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "llama", "llama")
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps(config | {"hidden_act": "nothing"}))
    with pytest.raises(MissingError) as caught:
        go(source, tmp_path / "out")
    assert str(source) in caught.value.message and "partial" not in caught.value.message
    assert not (tmp_path / "out").exists()
