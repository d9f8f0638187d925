"""Training: merged and mixed experts take the same steps, recomputed activations change no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methods.meo_convert.tinies import inputs, tiny
from pomona.methods.meo_convert import modeling_meo as meo

IDS = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(0))
STILL = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {},
}


def converted(name: str, **block: Any) -> Any:
    scope = "sequence" if name == "bert" else "prompt"
    model = tiny(name, **STILL[name])
    return meo.install(model, {"experts": 4, "selected": 2, "scope": scope, **block}).train()


def loss(model: Any) -> torch.Tensor:
    labels = IDS.clone()
    labels[:, :4] = -100
    mask = torch.ones_like(IDS)
    mask[0, 7:] = 0
    found: torch.Tensor = model(**inputs(model, IDS, mask), labels=labels).loss
    return found + meo.load_balancing_loss(model)


@pytest.mark.parametrize("level", ["sequence", "task"])
@pytest.mark.parametrize("name", STILL)
def test_merged_and_mixed_experts_learn_alike(name: str, level: str) -> None:
    start = converted(name, level=level, task_tokens=[3, 9]).state_dict()
    trained = []
    for run_as in ("meo", "moe"):
        model = converted(name, run_as=run_as, level=level, task_tokens=[3, 9])
        model.load_state_dict(start)
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            step = loss(model)
            step.backward()
            optimizer.step()
            losses.append(float(step.detach()))
        assert losses[-1] < 0.9 * losses[0]
        gates = [module.weight for module in model.modules() if isinstance(module, meo.NoisyTopK)]
        assert all(gate.abs().max() > 0 for gate in gates)
        trained.append(model.state_dict())
    for key, tensor in trained[0].items():
        torch.testing.assert_close(
            trained[1][key], tensor, atol=1e-4, rtol=1e-4, msg=lambda told, key=key: f"{key}: {told}"
        )


def test_experts_that_start_alike_drift_apart() -> None:
    model = converted("bert")
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    weight = model.bert.encoder.layer[0].intermediate.dense.weight.detach()
    assert (weight[0] - weight[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", STILL)
def test_recomputed_activations_change_no_gradient(name: str) -> None:
    found = []
    for recompute in (False, True):
        model = converted(name)
        if recompute:
            model.activation_checkpointing_enable()
        torch.manual_seed(4)
        loss(model).backward()
        found.append({key: parameter.grad for key, parameter in model.named_parameters()})
    assert all(grad is not None for grad in found[0].values())
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, atol=1e-6, rtol=1e-4)
