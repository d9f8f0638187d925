"""What a merge did: errors of sites and drifts of models, against formulas in float64 and weights merged by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from methods.mera_merge import bases
from methods.mera_merge.adapterhub import make_bottleneck, make_ia3, make_lora
from pomona.errors import DataError, MissingError, UnavailableError, UsageError
from pomona.methods.mera_merge import lowrank, merging, quality
from pomona.methods.mera_merge.adapters import Adapter, Bottleneck, read, with_sites
from pomona.methods.mera_merge.bottleneck import attach
from pomona.methods.mera_merge.config import Config
from pomona.models.loading import Loaded
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Quiet
from pomona.runtime.settings import Settings

Array = npt.NDArray[np.float64]
BATCHES = [{"input_ids": bases.TOKENS, "attention_mask": bases.MASK}]


def opened(folder: Path) -> Adapter:
    return read(str(folder), allow_pickle=False)


def bottlenecks(folder: Path, count: int = 2, **more: Any) -> list[Adapter]:
    return [opened(make_bottleneck(folder / f"a{seed}", seed=seed, **more)) for seed in range(1, count + 1)]


def merged(adapters: Sequence[Adapter], weights: Sequence[float], method: str = "avg") -> Adapter:
    return merging.merge(adapters, Config(method=method), method, weights, 0, None).adapter


def permuted(adapter: Adapter, order: Sequence[int]) -> Adapter:
    def moved(site: Bottleneck) -> Bottleneck:
        return Bottleneck(site.down[order], site.down_bias[order], site.up[:, order], site.up_bias)

    return with_sites(adapter, {name: moved(site) for name, site in adapter.sites().items()}, "permuted")


# --- sites -----------------------------------------------------------------------------------------------------------


def put_out(site: Bottleneck, x: Array) -> Array:
    down, bias, up, up_bias = (
        getattr(site, part).numpy().astype(np.float64) for part in ("down", "down_bias", "up", "up_bias")
    )
    found: Array = np.maximum(x @ down.T + bias, 0) @ up.T + up_bias
    return found


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.3), (1.0, 1.0), (1.0, -1.0)])
def test_the_error_of_a_site_is_its_distance_from_the_weighted_sum(
    tmp_path: Path, weights: tuple[float, float]
) -> None:
    adapters = bottlenecks(tmp_path)
    whole = merged(adapters, weights, "sum")
    found = quality.function_errors(whole, adapters, weights)
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    assert found.keys() == whole.sites().keys() and len(found) == 2
    for name, error in found.items():
        due = sum(w * put_out(a.sites()[name], x) for w, a in zip(weights, adapters, strict=True))
        wanted = np.linalg.norm(put_out(whole.sites()[name], x) - due) / np.linalg.norm(due)
        assert error == pytest.approx(wanted, rel=1e-12) and error > 0.1


def test_permuted_copies_are_without_error_once_matched_alone(tmp_path: Path) -> None:
    (adapter,) = bottlenecks(tmp_path, 1)
    both = [adapter, permuted(adapter, [2, 0, 1])]
    assert max(quality.function_errors(merged(both, [0.5, 0.5], "assign"), both, [0.5, 0.5]).values()) < 1e-14
    assert min(quality.function_errors(merged(both, [0.5, 0.5], "avg"), both, [0.5, 0.5]).values()) > 0.1


def test_a_sum_that_vanishes_gives_the_distance_itself(tmp_path: Path) -> None:
    (adapter,) = bottlenecks(tmp_path, 1)
    both = [adapter, dataclasses.replace(adapter, label="again")]
    assert set(quality.function_errors(merged(both, [1.0, -1.0], "sum"), both, [1.0, -1.0]).values()) == {0.0}


def test_where_an_adapter_sits_does_not_matter_to_its_sites(tmp_path: Path) -> None:
    both = bottlenecks(tmp_path, cross_adapter=True)
    assert quality.function_errors(merged(both, [0.5, 0.5]), both, [0.5, 0.5])


def test_an_activation_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    both = bottlenecks(tmp_path, non_linearity="wobble")
    with pytest.raises(DataError, match="non_linearity is 'wobble'"):
        quality.function_errors(merged(both, [0.5, 0.5]), both, [0.5, 0.5])


# --- models ----------------------------------------------------------------------------------------------------------


def base(model: Any, batches: Sequence[dict[str, torch.Tensor]] = BATCHES) -> quality.Base:
    model = model.eval().requires_grad_(False)
    return quality.Base(Loaded(model, None, {}), Runtime.open("cpu", "float32"), list(batches), [])


def relative(before: torch.Tensor, after: torch.Tensor) -> float:
    one, two = before.numpy().astype(np.float64), after.numpy().astype(np.float64)
    return float(np.linalg.norm(two - one) / np.linalg.norm(one))


@pytest.mark.parametrize("case", ["seq_bn", "double_seq_bn", "par_bn"])
def test_the_drift_between_bottlenecks_is_that_of_the_models_they_are_attached_to(tmp_path: Path, case: str) -> None:
    adapters = [opened(bases.adapter(tmp_path / str(seed), case, seed=seed)) for seed in (1, 2)]
    model = bases.base("bert")
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = quality.model_drift(base(model), *adapters, Quiet())
    outputs = []
    for adapter in adapters:
        with attach(model, adapter), torch.no_grad():
            outputs.append(model(bases.TOKENS, bases.MASK).last_hidden_state[bases.MASK.bool()])
    assert found.relative == pytest.approx(relative(*outputs), rel=1e-5)
    assert found.maximum == pytest.approx(float((outputs[1] - outputs[0]).abs().max()), rel=1e-5)
    assert (found.texts, found.tokens) == (2, 8) and found.divergence is None
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())


def llama(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


def saved_lora(folder: Path, model: Path, seed: int, **config: Any) -> Adapter:
    made = peft.get_peft_model(llama(model), peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **config}))
    torch.manual_seed(seed)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(folder)
    return opened(folder)


def by_hand(model: Path, adapter: Adapter) -> Any:
    """The model with the adapter's maps added to its weights."""
    changed = llama(model)
    with torch.no_grad():
        for module, map_ in lowrank.delta(adapter).items():
            layer = changed.get_submodule(module)
            layer.weight += map_.float()
            bias = lowrank.factors(adapter)[module].bias
            if bias is not None:
                layer.bias = torch.nn.Parameter(bias.float())
    return changed


TEXT = [{"input_ids": torch.arange(2, 26).reshape(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}]


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=["plain", "rslora", "bias"])
def test_the_drift_between_loras_is_that_of_weights_merged_by_hand(
    tmp_path: Path, tiny_model: Path, config: dict[str, Any]
) -> None:
    adapters = [saved_lora(tmp_path / str(seed), tiny_model, seed, **config) for seed in (1, 2)]
    model = llama(tiny_model)
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = quality.model_drift(base(model, TEXT), *adapters, Quiet())
    with torch.no_grad():
        logits = [by_hand(tiny_model, adapter)(TEXT[0]["input_ids"]).logits for adapter in adapters]
    assert found.relative == pytest.approx(relative(*logits), rel=1e-4) and found.relative > 0.01
    p, q = (one.double().log_softmax(-1) for one in logits)
    assert found.divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    losses = [-one[:, :-1].gather(-1, TEXT[0]["input_ids"][:, 1:, None]).mean() for one in (p, q)]
    assert found.perplexity_before == pytest.approx(float(losses[0].exp()), rel=1e-4)
    assert found.perplexity_after == pytest.approx(float(losses[1].exp()), rel=1e-4)
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == held.keys()


def test_an_adapter_that_changes_the_base_gets_weights_of_its_own(tmp_path: Path, tiny_model: Path) -> None:
    adapter = saved_lora(tmp_path / "pissa", tiny_model, 1, init_lora_weights="pissa")
    model = llama(tiny_model)
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert quality.model_drift(base(model, TEXT), adapter, adapter, Quiet()).relative == 0
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("layers", "having"), [(1, "the adapter has"), (3, "the model has")])
def test_a_lora_for_a_model_of_other_depth_is_refused(
    tmp_path: Path, tiny_model: Path, layers: int, having: str
) -> None:
    adapter = saved_lora(tmp_path / "lora", tiny_model, 1)
    config = llama(tiny_model).config
    config.num_hidden_layers, config.layer_types = layers, None
    other = AutoModelForCausalLM.from_config(config)
    with pytest.raises(DataError, match=rf"{having} model.layers.\d.self_attn.q_proj"):
        quality.model_drift(base(other, TEXT), adapter, adapter, Quiet())


def test_an_ia3_drifts_from_another(tmp_path: Path) -> None:
    places = r".*\.(key|value|\d\.output\.dense)"
    adapters = [
        opened(make_ia3(tmp_path / str(seed), seed=seed, target_modules=places, feedforward_modules=r".*\d\.output.*"))
        for seed in (1, 2)
    ]
    assert quality.model_drift(base(bases.base("bert")), *adapters, Quiet()).relative > 0.01


def test_without_peft_the_install_line_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = opened(make_lora(tmp_path / "lora", seed=1))
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UnavailableError) as raised:
        quality.model_drift(base(bases.base("bert")), adapter, adapter, Quiet())
    assert raised.value.hint is not None and "pip install 'pomona[merge]'" in raised.value.hint


# --- the base --------------------------------------------------------------------------------------------------------


def test_texts_are_cut_to_what_is_asked_and_no_more_is_asked_than_the_base_reads(
    tmp_path: Path, tiny_bert: Path
) -> None:
    loaded = quality.load_base(
        Config(base_model=str(tiny_bert), max_length=20, calib_samples=3), Settings(device="cpu")
    )
    assert max(batch["input_ids"].shape[1] for batch in loaded.batches) == 20
    assert sum(len(batch["input_ids"]) for batch in loaded.batches) == 3
    assert [source["name"] for source in loaded.sources] == [f"base model {tiny_bert}", "our own texts"]
    with pytest.raises(UsageError, match="--max-length is 129; the base model reads 128 tokens at most"):
        quality.load_base(Config(base_model=str(tiny_bert), max_length=129), Settings(device="cpu"))


def test_a_base_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    bases.base("bert").save_pretrained(tmp_path / "mute")
    with pytest.raises(MissingError, match="it has no tokenizer"):
        quality.load_base(Config(base_model=str(tmp_path / "mute"), max_length=8), Settings(device="cpu"))


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import save_tiny_bert

    return save_tiny_bert(tmp_path_factory.mktemp("bert") / "model")
