"""What routers do is counted over real tokens alone, and weighs experts as it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.meo_convert import mixtures
from pomona.errors import CheckFailed, DataError, MissingError, PomonaError, UsageError
from pomona.methods.meo_convert.config import Config
from pomona.methods.meo_convert.families import Family, recognise
from pomona.methods.meo_convert.routing import statistics
from pomona.methods.meo_convert.weighting import mass, needs_routing, references, weights
from pomona.models.checkpoint import Checkpoint


def softmax(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    e = np.exp(rows - rows.max(1, keepdims=True))
    found: np.ndarray[Any, Any] = e / e.sum(1, keepdims=True)
    return found


def seen(model: Any, family: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What every router saw, by hooks of the test's own."""
    found: dict[str, Tensor] = {}
    name = "router" if family == "switch_transformers" else "gate"
    handles = []
    for path, module in model.named_modules():
        if path.endswith(f"mlp.{name}"):
            index = path.split(".")[2]
            key = f"{path.split('.')[0]}.{index}" if family == "switch_transformers" else index
            handles.append(module.register_forward_hook(lambda m, given, out, key=key: found.update({key: given[0]})))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("family", mixtures.DECODERS)
def test_routing_is_the_formula_over_real_tokens(family: str, normalised: bool) -> None:
    model = mixtures.make(family, **({} if family == "mixtral" else {"norm_topk_prob": normalised}))
    ids = mixtures.inputs(family)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    found = statistics(model, [batch, {key: value[:1] for key, value in batch.items()}], keep=30)
    states = seen(model, family, batch)
    real = mask.flatten().bool()
    for layer, routing in found.items():
        rows = states[layer].reshape(-1, 16)[real].double().numpy()
        rows = np.concatenate([rows, rows[:24]])  # the first text came twice
        weight = model.get_submodule(f"model.layers.{layer}.mlp.gate").weight.detach().double().numpy()
        p = softmax(rows @ weight.T)
        chosen = np.argsort(-p, 1)[:, :2]
        gates = np.take_along_axis(p, chosen, 1)
        if family == "mixtral" or normalised:
            gates = gates / gates.sum(1, keepdims=True)
        assert routing.tokens == len(rows) == 24 + 9 + 24
        np.testing.assert_allclose(routing.frequency, np.bincount(chosen.ravel(), minlength=4) / chosen.size)
        np.testing.assert_allclose(routing.probability, p.mean(0), rtol=1e-5)
        assert routing.mass == pytest.approx(gates.sum(1).mean(), rel=1e-5)
        assert routing.inputs.shape == routing.outputs.shape == (30, 16)
        np.testing.assert_allclose(routing.inputs, rows[:30], rtol=1e-4, atol=1e-6)


def test_what_the_experts_made_is_kept_without_the_shared_expert() -> None:
    model = mixtures.make("qwen2_moe")
    found = statistics(model, [mixtures.inputs("qwen2_moe")], keep=5)
    for layer, routing in found.items():
        block = model.model.layers[int(layer)].mlp
        with torch.no_grad():
            _, gates, chosen = block.gate(routing.inputs)
            expected = block.experts(routing.inputs, chosen, gates)
        torch.testing.assert_close(routing.outputs, expected, rtol=1e-4, atol=1e-6)


def test_tokens_past_a_switch_experts_capacity_carry_nothing() -> None:
    model = mixtures.make("switch_transformers", expert_capacity=4)
    batch = mixtures.inputs("switch_transformers")
    found = statistics(model, [batch])
    states = seen(model, "switch_transformers", batch)
    assert found.keys() == states.keys() == {"encoder.1", "encoder.3", "decoder.1", "decoder.3"}
    for layer, routing in found.items():
        side, index = layer.split(".")
        block = getattr(model, side).block[int(index)].layer[-1].mlp
        weight = block.router.classifier.weight.detach().double().numpy()
        kept, total = np.zeros(4), 0.0
        every = []
        for text in states[layer].double().numpy():
            p = softmax(text @ weight.T)
            every.append(p)
            room = dict.fromkeys(range(4), 4)
            for row in p:
                best = int(row.argmax())
                if room[best]:
                    room[best] -= 1
                    kept[best] += 1
                    total += row[best]
        np.testing.assert_allclose(routing.frequency, kept / kept.sum())
        np.testing.assert_allclose(routing.probability, np.concatenate(every).mean(0), rtol=1e-5)
        assert routing.mass == pytest.approx(total / 48, rel=1e-5) and kept.sum() < 48


def test_a_decoder_without_a_text_of_its_own_reads_the_encoders_one_token_late() -> None:
    model = mixtures.make("switch_transformers")
    ids = mixtures.inputs("switch_transformers")["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    late = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)
    found = statistics(model, [{"input_ids": ids, "attention_mask": mask}])
    whole = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": late, "decoder_attention_mask": mask}
    for layer, routing in statistics(model, [whole]).items():
        assert torch.equal(routing.probability, found[layer].probability) and routing.tokens == 29


def test_a_model_without_routers_and_a_text_without_tokens_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(DataError, match="has no routers"):
        statistics(LlamaForCausalLM(LlamaConfig(vocab_size=20, **size)), [])
    with pytest.raises(DataError, match="saw no token"):
        statistics(mixtures.make("mixtral"), [])


def test_a_router_that_is_not_finite_is_named() -> None:
    model = mixtures.make("mixtral")
    model.model.layers[1].mlp.gate.weight.data[2] = float("nan")
    with pytest.raises(CheckFailed, match="layer 1: the router's logits"):
        statistics(model, [mixtures.inputs("mixtral")])


def test_looking_leaves_no_hook_behind() -> None:
    model = mixtures.make("mixtral")
    statistics(model, [mixtures.inputs("mixtral")], keep=3)
    assert not any(module._forward_hooks for module in model.modules())


# --- what follows from it --------------------------------------------------------------------------------------------


@pytest.fixture
def olmoe(tmp_path: Path) -> tuple[Any, Family]:
    model = mixtures.make("olmoe")
    return model, recognise(Checkpoint.open(mixtures.save(model, tmp_path / "olmoe")))


def test_weights_are_uniform_or_the_routers(olmoe: tuple[Any, Family]) -> None:
    model, family = olmoe
    routing = statistics(model, [mixtures.inputs("olmoe")])
    assert weights(family, "uniform") == {"0": [0.25] * 4, "1": [0.25] * 4}
    for choice, kind in (("router-frequency", "frequency"), ("router-prob", "probability")):
        found = weights(family, choice, routing)
        assert found == {layer: getattr(routing[layer], kind).tolist() for layer in ("0", "1")}
        assert all(sum(row) == pytest.approx(1) for row in found.values())
    assert mass(family, "keep", routing) == {layer: routing[layer].mass for layer in ("0", "1")}
    assert mass(family, "one", routing) == {}
    most = {layer: int(routing[layer].frequency.argmax()) for layer in ("0", "1")}
    assert references(family, "most-used", routing) == most
    assert references(family, "most-used", None) == {"0": 0, "1": 0}
    assert references(family, "3", routing) == {"0": 3, "1": 3}


def test_what_must_be_looked_up_first_is_said(olmoe: tuple[Any, Family], tmp_path: Path) -> None:
    _, family = olmoe
    with pytest.raises(UsageError, match="--weights router-prob"):
        weights(family, "router-prob")
    with pytest.raises(UsageError, match="--mass keep needs routing"):
        mass(family, "keep", None)
    with pytest.raises(UsageError, match="the experts are 0 to 3"):
        references(family, "4", None)
    normalised = recognise(Checkpoint.open(mixtures.save(mixtures.make("mixtral"), tmp_path / "mixtral")))
    assert mass(normalised, "keep", None) == {}
    assert needs_routing(family, Config()) and not needs_routing(family, Config(mass="one"))
    assert not needs_routing(normalised, Config())
    assert needs_routing(normalised, Config(weights="router-frequency"))
    assert needs_routing(normalised, Config(align="activations"))


def test_weights_of_a_file_are_for_all_layers_or_each(olmoe: tuple[Any, Family], tmp_path: Path) -> None:
    _, family = olmoe
    path = tmp_path / "weights.json"
    path.write_text("[1, 1, 0, 2]")
    assert weights(family, str(path)) == {"0": [0.25, 0.25, 0, 0.5], "1": [0.25, 0.25, 0, 0.5]}
    path.write_text(json.dumps({"1": [0, 0, 0, 3.0], "0": [1, 1, 1, 1]}))
    assert weights(family, str(path)) == {"0": [0.25] * 4, "1": [0, 0, 0, 1]}


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, MissingError, "cannot be read"),
        ("[1, 2", DataError, "it is not JSON"),
        ("3", DataError, "expected a list of 4 numbers"),
        ("[1, 2, 3]", DataError, "expected a list of 4 numbers"),
        ("[1, 2, 3, -1]", DataError, "0 or more"),
        ("[1, 2, 3, true]", DataError, "0 or more"),
        ("[1, 2, 3, NaN]", DataError, "0 or more"),
        ('[1, 2, 3, "4"]', DataError, "0 or more"),
        ("[0, 0, 0, 0]", DataError, "sum to 0"),
        ("[1e308, 1e308, 1e308, 1e308]", DataError, "sum to inf"),
        (f"[1, 2, 3, 1{'0' * 400}]", DataError, "0 or more"),
        ('{"0": [1, 1, 1, 1]}', DataError, "layer 1 is missing"),
        ('{"0": [1, 1, 1, 1], "1": [1, 1, 1, 1], "7": []}', DataError, "there is no layer 7"),
    ],
)
def test_a_file_of_weights_that_is_none_is_refused_in_one_line(
    content: str | None, kind: type[PomonaError], message: str, olmoe: tuple[Any, Family], tmp_path: Path
) -> None:
    path = tmp_path / "weights.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(kind, match=message) as caught:
        weights(olmoe[1], str(path))
    assert str(path) in caught.value.message and "\n" not in caught.value.message
