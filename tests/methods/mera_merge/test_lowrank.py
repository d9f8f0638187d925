"""LoRA is merged where it acts: what comes out is the weighted sum of ΔW, as float64 NumPy and PEFT have it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from methods.mera_merge.adapterhub import make_ia3, make_lora
from pomona.errors import CheckFailed, DataError
from pomona.methods.mera_merge import lowrank
from pomona.methods.mera_merge.adapters import Adapter, read, write

AT = "base_model.model.encoder.layer"


def opened(folder: Path) -> Adapter:
    return read(str(folder), allow_pickle=False)


def by_hand(folder: Path, scale: float) -> dict[str, NDArray[np.float64]]:
    """ΔW = scale · B A of each module from the file itself, float64 NumPy."""
    raw = {name: tensor.double().numpy() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    ends = "lora_A.weight"
    return {
        name[len("base_model.model.") : -len(ends) - 1]: scale * raw[name.replace("lora_A", "lora_B")] @ raw[name]
        for name in raw
        if name.endswith(ends)
    }


def relative(found: Any, truth: Any) -> float:
    return float(np.linalg.norm(np.asarray(found) - np.asarray(truth)) / np.linalg.norm(truth))


def weighted(
    deltas: Sequence[dict[str, NDArray[np.float64]]], weights: Sequence[float]
) -> dict[str, NDArray[np.float64]]:
    return {m: np.sum([w * d[m] for w, d in zip(weights, deltas, strict=True)], axis=0) for m in deltas[0]}


# --- ΔW --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"lora_alpha": 3}, 1.0),
        ({"lora_alpha": 3, "use_rslora": True}, math.sqrt(3)),
        ({"alpha_pattern": {"layer.1.attention.self.value": 12, "query": 6}, "lora_alpha": 3}, None),
        ({"rank_pattern": {"query": 2}, "lora_alpha": 6}, None),
    ],
)
def test_scaling_is_alpha_over_r_or_its_root_and_by_pattern(
    config: dict[str, Any], scale: float | None, tmp_path: Path
) -> None:
    adapter = opened(make_lora(tmp_path, seed=1, rank=3, **config))
    found = lowrank.delta(adapter)
    assert len(found) == 4
    for module, product in by_hand(tmp_path, 1.0).items():
        expected = scale
        if "alpha_pattern" in config:
            expected = 2.0 if "query" in module else (4.0 if "layer.1" in module else 1.0)
        if "rank_pattern" in config:
            expected = 3.0 if "query" in module else 2.0
        assert expected is not None
        assert relative(found[module], expected * product) < 1e-14


def test_embeddings_have_factors_too(tmp_path: Path) -> None:
    name = "base_model.model.embeddings.word_embeddings.lora_embedding"
    down, up = torch.randn(2, 30), torch.randn(8, 2)
    made = make_lora(tmp_path, seed=1, tensors={f"{name}_A": down, f"{name}_B": up})
    found = lowrank.delta(opened(made))["embeddings.word_embeddings"]
    assert relative(found, 2.0 * up.double().numpy() @ down.double().numpy()) < 1e-14
    merged = lowrank.delta_cat([opened(made), opened(made)], [0.5, 0.5])
    assert relative(lowrank.delta(merged)["embeddings.word_embeddings"], found) < 1e-6


# --- exact merges ----------------------------------------------------------------------------------------------------


@given(
    weights=st.lists(st.floats(-2, 2).filter(lambda w: abs(w) > 0.05), min_size=2, max_size=4),
    ranks=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    rslora=st.lists(st.booleans(), min_size=4, max_size=4),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=25, deadline=None)
def test_stacked_factors_are_the_weighted_sum(
    weights: list[float], ranks: list[int], rslora: list[bool], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any ranks, α, signs and scalings; float32 keeps 6e-8 and both factors are rounded."""
    folder = tmp_path_factory.mktemp("cat")
    adapters, truths = [], []
    for index in range(len(weights)):
        rank, root = ranks[index], rslora[index]
        own = make_lora(folder / str(index), seed=seed + index, rank=rank, lora_alpha=rank + 1, use_rslora=root)
        adapters.append(opened(own))
        truths.append(by_hand(own, (rank + 1) / (math.sqrt(rank) if root else rank)))
    merged = lowrank.delta_cat(adapters, weights)
    assert merged.config["r"] == merged.config["lora_alpha"] == sum(ranks[: len(weights)])
    for module, truth in weighted(truths, weights).items():
        size = max(float(np.linalg.norm(d[module])) for d in truths)
        assert np.linalg.norm(lowrank.delta(merged)[module].numpy() - truth) < 1e-6 * size


def test_stacked_factors_err_by_rounding_alone(tmp_path: Path) -> None:
    """The figure of 6e-8 for two random LoRAs."""
    made = [make_lora(tmp_path / str(seed), seed=seed, width=64, rank=8) for seed in (1, 2)]
    adapters = [opened(folder) for folder in made]
    merged = lowrank.delta_cat(adapters, [0.3, 0.7])
    truth = weighted([by_hand(folder, 2.0) for folder in made], [0.3, 0.7])
    said = lowrank.deviation(merged, adapters, [0.3, 0.7])
    for module, expected in truth.items():
        assert relative(lowrank.delta(merged)[module], expected) < 6e-8
        assert said[module] == pytest.approx(relative(lowrank.delta(merged)[module], expected), rel=1e-6)


@pytest.mark.parametrize("rank", [None, 1, 2, 3, 5, 6, 40])
def test_a_low_rank_is_the_best_there_is(rank: int | None, tmp_path: Path) -> None:
    """Against the SVD of the whole matrix: its error is that of Eckart and Young, and that is what is reported."""
    made = [make_lora(tmp_path / str(seed), seed=seed, width=12, rank=r) for seed, r in ((1, 2), (2, 3))]
    adapters = [opened(folder) for folder in made]
    merged, residual = lowrank.delta_svd(adapters, [0.6, 0.4], rank)
    kept = min(rank or 3, 5)
    assert merged.config["r"] == merged.config["lora_alpha"] == kept
    for module, truth in weighted([by_hand(folder, 2.0) for folder in made], [0.6, 0.4]).items():
        values = np.linalg.svd(truth, compute_uv=False)
        best = math.sqrt(float((values[kept:] ** 2).sum()) / float((values**2).sum()))
        assert residual[module] == pytest.approx(best, abs=2e-7)
        assert relative(lowrank.delta(merged)[module], truth) == pytest.approx(best, abs=2e-7)


def test_more_factors_than_the_map_has_dimensions_are_no_trouble(tmp_path: Path) -> None:
    adapters = [opened(make_lora(tmp_path / str(seed), seed=seed, width=4, rank=3)) for seed in range(4)]
    merged, residual = lowrank.delta_svd(adapters, [0.25] * 4, 12)
    assert merged.config["r"] == 4 and max(residual.values()) < 1e-6


def test_modules_of_different_ranks_get_one_and_lose_nothing(tmp_path: Path) -> None:
    made = [make_lora(tmp_path / str(seed), seed=seed, rank_pattern={"query": 4}, lora_alpha=4) for seed in (1, 2)]
    adapters = [opened(folder) for folder in made]
    merged = lowrank.delta_cat(adapters, [1.0, 1.0])
    assert merged.config["r"] == 8 and merged.config["rank_pattern"] == {} == merged.config["alpha_pattern"]
    assert {tuple(t.shape) for n, t in merged.tensors.items() if "lora_A" in n} == {(8, 8)}
    assert max(lowrank.deviation(merged, adapters, [1.0, 1.0]).values()) < 1e-7
    merged, residual = lowrank.delta_svd(adapters, [1.0, 1.0])
    assert merged.config["r"] == 4 and max(v for m, v in residual.items() if "value" in m) < 1e-7


def test_equal_loras_in_rotated_bases_merge_to_the_same(tmp_path: Path) -> None:
    """B Q and Qᵀ A are the same LoRA; sums of factors lose most of it (B8)."""
    random = torch.Generator().manual_seed(3)
    first = make_lora(tmp_path / "first", seed=1, width=32, rank=8)
    turned = {}
    for name, tensor in load_file(first / "adapter_model.safetensors").items():
        if "lora_A" in name:
            q = torch.linalg.qr(torch.randn(8, 8, generator=random, dtype=torch.float64)).Q
            turned[name] = (q.T @ tensor.double()).float()
            other = name.replace("lora_A", "lora_B")
            turned[other] = (load_file(first / "adapter_model.safetensors")[other].double() @ q).float()
    make_lora(tmp_path / "second", seed=2, width=32, rank=8)
    save_file(turned, tmp_path / "second/adapter_model.safetensors")
    adapters, weights = [opened(first), opened(tmp_path / "second")], [0.5, 0.5]
    truth = by_hand(first, 2.0)
    merged, residual = lowrank.delta_svd(adapters, weights)
    assert merged.config["r"] == 8 and max(residual.values()) < 1e-6
    assert max(relative(lowrank.delta(merged)[m], truth[m]) for m in truth) < 1e-6
    stacked = lowrank.delta(lowrank.delta_cat(adapters, weights))
    assert max(relative(stacked[m], truth[m]) for m in truth) < 1e-6
    wrong = lowrank.deviation(lowrank.linear(adapters, weights), adapters, weights)
    assert min(wrong.values()) > 0.4 and max(wrong.values()) < 1.3


def test_biases_are_merged_with_their_scale(tmp_path: Path) -> None:
    made = [make_lora(tmp_path / str(seed), seed=seed, lora_bias=seed < 3, lora_alpha=seed) for seed in (1, 2, 3)]
    merged = lowrank.delta_cat([opened(folder) for folder in made], [0.2, 0.3, 0.5])
    raw = [load_file(folder / "adapter_model.safetensors") for folder in made]
    assert merged.config["lora_bias"] is True
    for layer in (0, 1):
        name = f"{AT}.{layer}.attention.self.query.lora_B.bias"
        expected = 0.2 * 0.5 * raw[0][name].double() + 0.3 * 1.0 * raw[1][name].double()
        assert torch.allclose(merged.tensors[name].double(), expected, atol=1e-7)


def test_sums_of_factors_need_equal_ranks(tmp_path: Path) -> None:
    adapters = [opened(make_lora(tmp_path / str(rank), seed=1, rank=rank)) for rank in (2, 3)]
    with pytest.raises(DataError, match="r differs: 2, 3"):
        lowrank.linear(adapters, [0.5, 0.5])


def test_a_sum_that_vanishes_deviates_by_nothing(tmp_path: Path) -> None:
    adapters = [opened(make_lora(tmp_path / name, seed=1)) for name in "ab"]
    merged = lowrank.delta_cat(adapters, [1.0, -1.0])
    assert max(lowrank.deviation(merged, adapters, [1.0, -1.0]).values()) < 1e-3
    empty = opened(make_lora(tmp_path / "c", seed=1, tensors=zeros(adapters[0])))
    merged, residual = lowrank.delta_svd([empty, empty], [0.5, 0.5])
    assert set(residual.values()) == {0.0} and not any(tensor.any() for tensor in merged.tensors.values())


def test_cross_terms_alone_are_reported_as_they_are(tmp_path: Path) -> None:
    """Neither LoRA does anything, and the product of the summed factors does."""
    first = opened(make_lora(tmp_path / "a", seed=1))
    without_up = opened(make_lora(tmp_path / "b", seed=1, tensors=zeros(first)))
    ones = {name: torch.zeros_like(tensor) for name, tensor in first.tensors.items() if "lora_A" in name}
    without_down = opened(make_lora(tmp_path / "c", seed=1, tensors=ones))
    pair = [without_up, without_down]
    wrong = lowrank.deviation(lowrank.linear(pair, [1.0, 1.0]), pair, [1.0, 1.0])
    truth = by_hand(tmp_path / "a", 2.0)
    assert all(error == pytest.approx(float(np.linalg.norm(truth[m])), rel=1e-6) for m, error in wrong.items())


def zeros(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in adapter.tensors.items() if "lora_B" in name}


def test_the_number_format_stays(tmp_path: Path) -> None:
    made = [make_lora(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    for folder in made:
        half = {name: tensor.bfloat16() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
        save_file(half, folder / "adapter_model.safetensors")
    adapters = [opened(folder) for folder in made]
    merged, residual = lowrank.delta_svd(adapters, [0.5, 0.5], 4)
    assert {tensor.dtype for tensor in merged.tensors.values()} == {torch.bfloat16}
    assert 1e-4 < max(residual.values()) < 1e-2  # the rounding is reported


# --- one adapter, and what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}])
def test_one_adapter_of_weight_1_comes_back_bit_for_bit(config: dict[str, Any], tmp_path: Path) -> None:
    adapter = opened(make_lora(tmp_path / "a", seed=1, **config))
    for merged in (
        lowrank.delta_svd([adapter], [1.0])[0],
        lowrank.delta_cat([adapter], [1.0]),
        lowrank.linear([adapter], [1.0]),
    ):
        assert merged.config == adapter.config
        assert merged.tensors.keys() == adapter.tensors.keys()
        assert all(torch.equal(merged.tensors[name], tensor) for name, tensor in adapter.tensors.items())
        write(tmp_path / "out", merged)
        for path in (tmp_path / "a").iterdir():
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("config", [{"use_dora": True}, {"bias": "all"}, {"init_lora_weights": "pissa"}])
def test_one_adapter_of_another_weight_is_refused_where_it_is_more_than_low_rank(
    config: dict[str, Any], tmp_path: Path
) -> None:
    adapter = opened(make_lora(tmp_path, seed=1, **config))
    for merge in (lowrank.delta_svd, lowrank.delta_cat, lowrank.linear):
        with pytest.raises(DataError, match=next(iter(config))):
            merge([adapter], [0.5])


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"lora_bias": True}, {}])
def test_one_adapter_of_another_weight_is_scaled(config: dict[str, Any], tmp_path: Path) -> None:
    adapter = opened(make_lora(tmp_path, seed=1, **config))
    before = lowrank.delta(adapter)
    for merged in (
        lowrank.delta_svd([adapter], [-0.5])[0],
        lowrank.delta_cat([adapter], [-0.5]),
        lowrank.linear([adapter], [-0.5]),
    ):
        after = lowrank.delta(merged)
        assert all(relative(after[module], -0.5 * tensor.numpy()) < 1e-6 for module, tensor in before.items())


def test_ranks_that_the_configuration_contradicts_are_refused(tmp_path: Path) -> None:
    make_lora(tmp_path / "a", seed=1, r=7)
    make_lora(tmp_path / "b", seed=1, rank_pattern={"query": 4})
    (tmp_path / "b/adapter_config.json").write_text(
        (tmp_path / "b/adapter_config.json").read_text().replace('"query": 4', '"query": "4"')
    )
    with pytest.raises(DataError, match="rank 2, and its configuration says 7"):
        lowrank.delta(opened(tmp_path / "a"))
    with pytest.raises(DataError, match="rank 4, and its configuration says '4'"):
        lowrank.delta(opened(tmp_path / "b"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"alpha_pattern": ["query"]}, "alpha_pattern is"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is no pattern"),
    ],
)
def test_damaged_scalings_are_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        lowrank.delta(opened(make_lora(tmp_path, seed=1, **config)))


def test_convolutions_are_refused(tmp_path: Path) -> None:
    name = "base_model.model.conv.lora"
    made = make_lora(
        tmp_path,
        seed=1,
        tensors={f"{name}_A.weight": torch.ones(2, 3, 3, 3), f"{name}_B.weight": torch.ones(4, 2, 1, 1)},
    )
    with pytest.raises(DataError, match="conv: factors of a convolution"):
        lowrank.delta(opened(made))


def test_what_overflows_is_a_failed_check(tmp_path: Path) -> None:
    made = make_lora(tmp_path, seed=1)
    half = {name: tensor.half() for name, tensor in load_file(made / "adapter_model.safetensors").items()}
    save_file(half, made / "adapter_model.safetensors")
    with pytest.raises(CheckFailed, match=r"lora_B\.weight is not finite"):
        lowrank.delta_cat([opened(made), opened(made)], [1e7, 1.0])


# --- (IA)^3 ----------------------------------------------------------------------------------------------------------


def test_ia3_is_the_weighted_sum_of_its_vectors(tmp_path: Path) -> None:
    made = [make_ia3(tmp_path / str(seed), seed=seed) for seed in (1, 2, 3)]
    adapters, weights = [opened(folder) for folder in made], [0.5, 0.75, -0.25]
    merged = lowrank.ia3_average(adapters, weights)
    raw = [load_file(folder / "adapter_model.safetensors") for folder in made]
    for name, tensor in merged.tensors.items():
        expected = sum(w * r[name].double().numpy() for w, r in zip(weights, raw, strict=True))
        assert np.abs(tensor.double().numpy() - expected).max() < 1e-7
    assert merged.config == adapters[0].config


def test_one_ia3_of_weight_1_comes_back_bit_for_bit(tmp_path: Path) -> None:
    adapter = opened(make_ia3(tmp_path / "a", seed=1))
    write(tmp_path / "out", lowrank.ia3_average([adapter], [1.0]))
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_the_order_of_adapters_does_not_matter_and_runs_repeat(tmp_path: Path) -> None:
    adapters = [opened(make_lora(tmp_path / str(seed), seed=seed)) for seed in (1, 2, 3)]
    forth, _ = lowrank.delta_svd(adapters, [0.2, 0.3, 0.5])
    back, _ = lowrank.delta_svd([adapters[0], adapters[2], adapters[1]], [0.2, 0.5, 0.3])
    for module, tensor in lowrank.delta(forth).items():
        assert relative(lowrank.delta(back)[module], tensor.numpy()) < 1e-6
    again, _ = lowrank.delta_svd(adapters, [0.2, 0.3, 0.5])
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in forth.tensors.items())
