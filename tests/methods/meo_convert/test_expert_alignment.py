"""Hidden units of experts that compute the same in another order are put in one order before they are merged."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from methods.meo_convert import mixtures
from methods.meo_convert.test_static import load, merge
from pomona.errors import CheckFailed
from pomona.methods.meo_convert.expert_alignment import Alignment, activations, match
from pomona.methods.meo_convert.families import recognise
from pomona.methods.meo_convert.routing import statistics
from pomona.methods.meo_convert.static import digest
from pomona.models.checkpoint import Checkpoint

FAMILIES = ("mixtral", "qwen2_moe", "switch_transformers")


def shuffled(model: object) -> dict[tuple[int, int], Tensor]:
    """Copies of one expert, each with its hidden units in an order of its own; gives back the orders."""
    mixtures.alike(model)
    stacks = iter(mixtures.stacks(model))
    generator = torch.Generator().manual_seed(7)
    orders = {}
    for layer, (first, last) in enumerate(zip(stacks, stacks, strict=False)):
        width = last[0].shape[1]
        for expert in range(1, len(first)):
            order = orders[layer, expert] = torch.randperm(width, generator=generator)
            rows = torch.cat([order, order + width]) if len(first[0]) == 2 * width else order
            first[expert].copy_(first[expert][rows])
            last[expert].copy_(last[expert][:, order])
    return orders


def alignment(model: object, family: str, features: str, source: Path, reference: int = 0) -> Alignment:
    routing = statistics(model, [mixtures.inputs(family)], keep=48)  # type: ignore[arg-type]
    layers = [layer.name for layer in recognise(Checkpoint.open(source)).layers]
    return Alignment(
        features,  # type: ignore[arg-type]
        dict.fromkeys(layers, reference),
        {name: routing[name].inputs for name in layers},
        "relu" if family == "switch_transformers" else "silu",
    )


@pytest.mark.parametrize("features", ["weights", "activations"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shuffled_copies_are_found_and_merged_into_the_original(family: str, features: str, tmp_path: Path) -> None:
    model = mixtures.make(family, **({"norm_topk_prob": True} if family == "qwen2_moe" else {}))
    orders = shuffled(model)
    source = mixtures.save(model, tmp_path / "in")
    align = alignment(model, family, features, source)
    result = merge(source, tmp_path / "out", align=align)
    checkpoint = Checkpoint.open(source)
    layers = recognise(checkpoint).layers
    for number, layer in enumerate(layers):
        found = match(checkpoint, layer, align)
        assert torch.equal(found.permutations[0], torch.arange(len(found.permutations[0])))
        for expert in range(1, 4):
            assert torch.equal(orders[number, expert][found.permutations[expert]], found.permutations[0])
        told = result.alignment[layer.name]
        assert told["cost_before"] > 1 and told["cost_after"] < 1e-3 * told["cost_before"] and told["moved"] > 0.8
        name = result.merged[layer.name]["down"]
        assert result.provenance[name]["permutations"] == [digest(p) for p in found.permutations]
        merged, first = Checkpoint.open(tmp_path / "out").read(name), layer.maps["down"][0]
        assert torch.equal(merged, checkpoint.read(first.tensor).reshape(first.shape))
    if family != "switch_transformers":
        plain = merge(source, tmp_path / "plain")
        assert not plain.alignment
        one, other, expected = (
            mixtures.logits(found, family)
            for found in (load(tmp_path / "out", family), load(tmp_path / "plain", family), model)
        )
        assert (one - expected).abs().max() <= 1e-5 and (other - expected).abs().max() > 0.5


def test_the_match_is_the_cheapest_of_all(tmp_path: Path) -> None:
    """Against every permutation of five hidden units, features and costs in NumPy."""
    source = mixtures.save(mixtures.make("mixtral", intermediate_size=5, num_local_experts=3), tmp_path)
    checkpoint = Checkpoint.open(source)
    for layer in recognise(checkpoint).layers:
        parts = {
            role: [checkpoint.read(part.tensor).double().numpy() for part in found]
            for role, found in layer.maps.items()
        }
        units = [np.concatenate([parts["gate"][n], parts["up"][n], parts["down"][n].T], 1) for n in range(3)]
        before = after = moved = 0.0
        found = match(checkpoint, layer, Alignment("weights", {layer.name: 1}, {}))
        for expert in (0, 2):
            cost = np.linalg.norm(units[1][:, None] - units[expert][None], axis=2)
            best = min(itertools.permutations(range(5)), key=lambda p: sum(cost[i, p[i]] for i in range(5)))
            assert found.permutations[expert].tolist() == list(best)
            before += np.trace(cost)
            after += sum(cost[i, best[i]] for i in range(5))
            moved += np.mean([i != best[i] for i in range(5)]) / 2
        assert found.permutations[1].tolist() == [0, 1, 2, 3, 4]
        assert (found.cost_before, found.cost_after, found.moved) == pytest.approx((before, after, moved), rel=1e-9)


@pytest.mark.parametrize("gated", [True, False])
def test_activations_are_those_between_the_maps(gated: bool) -> None:
    torch.manual_seed(0)
    inputs, gate, up = torch.randn(7, 4), torch.randn(6, 4), torch.randn(6, 4)
    if gated:
        found = activations(inputs, {"gate": gate, "up": up}, "silu")
        expected = functional.silu(inputs @ gate.T) * (inputs @ up.T)
    else:
        found, expected = activations(inputs, {"up": up}, "relu"), functional.relu(inputs @ up.T)
    torch.testing.assert_close(found, expected)


def test_activations_that_are_not_finite_are_named(tmp_path: Path) -> None:
    source = mixtures.save(mixtures.make("mixtral"), tmp_path)
    checkpoint = Checkpoint.open(source)
    layer = recognise(checkpoint).layers[1]
    inputs = torch.full((3, 16), float("inf"))
    with pytest.raises(CheckFailed, match="layer 1: the activations of expert 0"):
        match(checkpoint, layer, Alignment("activations", {"1": 0}, {"1": inputs}))
