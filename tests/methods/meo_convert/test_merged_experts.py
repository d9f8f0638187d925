"""Experts of mixtures merged by their own router, against the mixture where both agree (A2, properties 1, 3, 5)."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.meo_convert.tinies import MIXTURES, inputs, tiny
from pomona.methods.meo_convert import modeling_meo as meo

IDS = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(0))


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs(model, IDS)).logits
    return found


def converted(model: Any, **more: Any) -> Any:
    k = getattr(model.config, "num_experts_per_tok", 1)
    return meo.install(copy.deepcopy(model), {"experts": 4, "selected": k, "scope": "prompt", **more})


def blocks(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "experts") and (hasattr(m, "gate") or hasattr(m, "router"))]


def weights(block: Any) -> list[list[Tensor]]:
    """The two maps of every expert, as views that can be set."""
    experts = block.experts
    if isinstance(experts, torch.nn.ModuleDict):
        return [[expert.wi.weight.data for expert in experts.values()], [e.wo.weight.data for e in experts.values()]]
    return [list(experts.gate_up_proj.data), list(experts.down_proj.data)]


def router(block: Any) -> Any:
    return block.router.classifier if hasattr(block, "router") else block.gate


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("scope", ["prompt", "segment:2"])
@pytest.mark.parametrize("name", MIXTURES)
def test_equal_experts_make_the_merge_exact_whatever_their_gates_sum_to(name: str, scope: str, level: str) -> None:
    model = tiny(name)
    for block in blocks(model):
        for experts in weights(block):
            for expert in experts[1:]:
                expert.copy_(experts[0])
    torch.testing.assert_close(
        outputs(converted(model, scope=scope, level=level)), outputs(model), atol=3e-6, rtol=1e-5
    )
    if name in ("olmoe", "qwen2_moe", "qwen3_moe", "switch_transformers"):
        forgotten = outputs(converted(model, scope=scope, mass="one"))
        assert (forgotten - outputs(model)).abs().max() > 1e-2


@pytest.mark.parametrize("name", MIXTURES)
def test_a_router_that_is_sure_of_one_expert_gives_that_expert(name: str) -> None:
    model = tiny(name)
    merged = converted(model)
    x = torch.randn(2, 5, 16)
    x[..., 0] = 1.0
    for old, new in zip(blocks(model), blocks(merged), strict=True):
        assert isinstance(new, meo.MergedExperts)
        with torch.no_grad():
            for block in (old, new):
                router(block).weight.zero_()
                router(block).weight[2, 0] = 1e3
            torch.testing.assert_close(new(x), old(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_a_merged_block_is_the_formula(name: str) -> None:
    model = converted(tiny(name))
    block = next(m for m in model.modules() if isinstance(m, meo.MergedExperts))
    block.scene.whole = True
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        found = block(x).double().numpy()
    gate_up, down = (p.detach().double().numpy() for p in (block.experts.gate_up_proj, block.experts.down_proj))
    routes = block.gate.weight.detach().double().numpy()

    def silu(z: Any) -> Any:
        return z / (1 + np.exp(-z))

    for row, tokens in enumerate(x.double().numpy()):
        logits = routes @ tokens.mean(0)
        kept = np.argsort(-logits)[:2]
        scores = np.exp(logits[kept]) / np.exp(logits[kept]).sum()
        into, out = (np.einsum("k,kfd->fd", scores, each[kept]) for each in (gate_up, down))
        gate, up = np.split(tokens @ into.T, 2, axis=1)
        expected = (silu(gate) * up) @ out.T
        if name != "mixtral":
            every = np.exp(tokens @ routes.T)
            mass = np.sort(every / every.sum(1, keepdims=True), 1)[:, -2:].sum(1, keepdims=True)
            expected = expected * mass
        if name == "qwen2_moe":
            w = {k: p.detach().double().numpy() for k, p in block.shared_expert.named_parameters()}
            inner = silu(tokens @ w["gate_proj.weight"].T) * (tokens @ w["up_proj.weight"].T)
            opened = 1 / (1 + np.exp(-tokens @ block.shared_expert_gate.weight.detach().double().numpy().T))
            expected = expected + opened * (inner @ w["down_proj.weight"].T)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_permuting_experts_with_their_router_changes_nothing(name: str) -> None:
    model = tiny(name)
    before = outputs(converted(model))
    order = torch.tensor([2, 0, 3, 1])
    for block in blocks(model):
        for experts in weights(block):
            for expert, new in zip(experts, [experts[j].clone() for j in order], strict=True):
                expert.copy_(new)
        with torch.no_grad():
            router(block).weight.copy_(router(block).weight[order])
    torch.testing.assert_close(outputs(converted(model)), before, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_run_as_one_is_left_as_it_is(name: str) -> None:
    model = tiny(name)
    assert torch.equal(outputs(converted(model, run_as="moe")), outputs(model))


def test_all_parameters_learn_through_the_merge() -> None:
    for name in MIXTURES:
        model = converted(tiny(name, output_router_logits=True)).train()
        model(**inputs(model, IDS), labels=IDS).loss.backward()
        for block in blocks(model):
            for parameter in (router(block).weight, *block.experts.parameters()):
                assert parameter.grad is not None and parameter.grad.isfinite().all()
