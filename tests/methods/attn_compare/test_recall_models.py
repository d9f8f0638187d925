"""The small model against formulas: every kernel's rows, one step of training, gradients where weights vanish."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pomona.methods.attn_compare import kernels
from pomona.methods.attn_compare.maps import Favor
from pomona.methods.attn_compare.recall.models import WIDTH, RecallModel, state_bytes
from pomona.methods.attn_compare.recall.training import Questions, Trial, tensors

Array = NDArray[np.float64]
R = 8


def trial(kernel: str = "exp", **changed: Any) -> Trial:
    sizes: dict[str, Any] = {"vocabulary": 32, "feature_dim": R, "steps": 10, "seed": 0, "number": 0}
    return Trial(**{"task": "mqar", "pairs": 4, "kernel": kernels.find(kernel), **sizes, **changed})


def questions(some: Trial, count: int = 16) -> Questions:
    return tensors(some.draw(some.random("training"), count), "cpu")


def _softmax(x: Array) -> Array:
    e: Array = np.exp(x)
    return e / e.sum(-1, keepdims=True)


def _favor(x: Array, w: Array) -> Array:
    result: Array = np.exp(x @ w.T - (x**2).sum(-1, keepdims=True) / 2)
    return result


def formula(model: RecallModel, name: str, q: Array, k: Array) -> Array:
    """Unnormalised weights (n, m) of one sequence, from the formulas of the papers."""
    scores = q @ k.T / math.sqrt(R)
    root = R**-0.25
    if name == "exp":
        return np.asarray(np.exp(scores))
    if name == "taylor2":
        return 1 + scores + scores**2 / 2
    if name.startswith("pow:"):
        return np.asarray(scores ** int(name[4:]))
    if name == "euler:8":
        return np.asarray((1 + scores / 8) ** 8)
    if name == "elu1":
        return np.asarray(np.where(q > 0, q + 1, np.exp(q)) @ np.where(k > 0, k + 1, np.exp(k)).T)
    if name == "relu":
        return np.asarray(np.maximum(q, 0) @ np.maximum(k, 0).T)
    if name == "relu2":
        return np.asarray(np.maximum(q, 0) ** 2 @ (np.maximum(k, 0) ** 2).T)
    if name == "cosformer":
        near = np.cos(np.pi / 2 / len(q) * (np.arange(len(q))[:, None] - np.arange(len(q))))
        return np.asarray(np.maximum(q, 0) @ np.maximum(k, 0).T * near)
    assert model.maps is not None
    if name == "favor:64":
        assert isinstance(model.maps[0], Favor)
        w = model.maps[0].projection.numpy()
        return _favor(q * root, w) @ _favor(k * root, w).T
    raise AssertionError(name)


NAMES = ("exp", "taylor2", "pow:4", "euler:8", "elu1", "relu", "relu2", "cosformer", "favor:64")


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_that_are_asked_are_the_causal_attention_of_the_formula(name: str) -> None:
    random = np.random.default_rng(1)
    model = trial(name).model().double()
    q, k = random.normal(size=(2, 3, 16, R))
    asked = np.sort(np.array([random.permutation(16)[:5] for _ in range(3)]))
    found = model.mixing(torch.from_numpy(q), torch.from_numpy(k), torch.from_numpy(asked)).detach().numpy()
    for sequence in range(3):
        raw = np.tril(formula(model, name, q[sequence], k[sequence]))
        total = raw.sum(-1, keepdims=True)
        expected = np.divide(raw, total, out=np.zeros_like(raw), where=total != 0)
        assert found[sequence] == pytest.approx(expected[asked[sequence]], abs=1e-12)


@pytest.mark.parametrize("kernel", kernels.registered(), ids=lambda kernel: kernel.name)
def test_only_rows_that_are_asked_differ_from_the_whole_attention_matrix(kernel: kernels.Kernel) -> None:
    """Every kernel of the registry, learned maps included."""
    model = trial(kernel.name).model().double()
    q, k = torch.randn((2, 3, 16, R), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    asked = torch.tensor([[0, 7, 15], [1, 2, 3], [5, 14, 15]])
    maps: Any = None if model.maps is None else tuple(model.maps)
    whole = kernels.attention(kernel, q, k, model.scale, visible=torch.ones(16, 16, dtype=torch.bool).tril(), maps=maps)
    found = model.mixing(q, k, asked)
    for sequence in range(3):
        torch.testing.assert_close(found[sequence], whole[sequence, asked[sequence]], rtol=1e-12, atol=1e-12)


def _reference(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits (b, n, V) everywhere: the model written with torch's own convolution and attention."""
    x = parameters["embedding"][tokens]
    # conv1d's kernel runs from the earliest token to the present one
    filters = parameters["convolution"].flip(0).T[:, None, :]
    mixed = functional.conv1d(functional.pad(x.mT, (2, 0)), filters, groups=WIDTH).mT
    h = x + mixed
    q, k, v = (h @ parameters[name] for name in ("of_queries", "of_keys", "of_values"))
    y = h + functional.scaled_dot_product_attention(q, k, v, is_causal=True) @ parameters["output"]
    return y @ parameters["embedding"].T


def test_one_step_with_softmax_is_that_of_a_model_written_with_torchs_own_attention() -> None:
    some = trial()
    model = some.model()
    tokens, asked, answers = questions(some)
    copies = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    everywhere = torch.full(tokens.shape, -100)
    everywhere.scatter_(1, asked, answers)

    loss = functional.cross_entropy(model(tokens, asked), answers.flatten())
    expected = functional.cross_entropy(_reference(copies, tokens).flatten(0, 1), everywhere.flatten())
    torch.testing.assert_close(loss, expected)
    for optimised, value in ((list(model.parameters()), loss), (list(copies.values()), expected)):
        optimiser = torch.optim.AdamW(optimised, lr=1e-3, eps=1e-3)  # a large eps: no step by the sign of rounding
        torch.autograd.backward(value)
        optimiser.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, copies[name].grad, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(value, copies[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["exp", "favor:64", "pow:16", "taylor2"])
def test_later_tokens_change_nothing(name: str) -> None:
    some = trial(name)
    model = some.model().double()
    tokens = questions(some).tokens
    asked = torch.arange(10).expand(len(tokens), -1)
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 32
    with torch.no_grad():
        assert torch.equal(model(tokens, asked), model(changed, asked))


@pytest.mark.parametrize("name", [kernel.name for kernel in kernels.registered()])
def test_models_of_a_seed_begin_alike_whatever_their_kernel(name: str) -> None:
    common = dict(trial("exp").model().named_parameters())
    found = {key: value for key, value in trial(name).model().named_parameters() if not key.startswith("maps.")}
    assert found.keys() == common.keys()
    assert all(torch.equal(value, common[key]) for key, value in found.items())
    ours, theirs = questions(trial(name)), questions(trial("exp"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_seeds_numbers_tasks_and_purposes_have_streams_of_their_own() -> None:
    same = trial()
    others = [trial(seed=1), trial(number=1), trial(task="copy"), trial(pairs=5), trial(vocabulary=34)]
    draws = [each.random(purpose).random() for each in (same, *others) for purpose in ("parameters", "training")]
    draws.append(same.random("held-out").random())
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("name", [*(kernel.name for kernel in kernels.registered()), "pow:2", "pow:64", "favor:64"])
def test_gradients_in_float32_are_finite(name: str) -> None:
    """Where all features vanish, where scores are in the hundreds, and at the beginning."""
    some = trial(name)
    tokens, asked, answers = questions(some)
    for factor in (1.0, 30.0, 0.0):
        model = some.model()
        with torch.no_grad():
            for part in (model.of_queries, model.of_keys):
                part *= factor
        loss = functional.cross_entropy(model(tokens, asked), answers.flatten())
        torch.autograd.backward(loss)
        assert loss.isfinite()
        assert all(value.grad is None or bool(value.grad.isfinite().all()) for value in model.parameters())


@pytest.mark.parametrize("name", ["exp", "pow:4", "favor:64", "relu"])
def test_gradients_agree_with_differences(name: str) -> None:
    model = trial(name).model().double()
    q, k = torch.randn((2, 2, 6, R), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    asked = torch.tensor([[0, 3], [4, 5]])
    q, k = (each.abs().requires_grad_() for each in (q, k))
    torch.autograd.gradcheck(lambda queries, keys: model.mixing(queries, keys, asked), (q, k))


@pytest.mark.parametrize(("name", "earlier", "later"), [("exp", 0.0, 200.0), ("favor:64", 30.0, 0.0)])
def test_a_weight_that_overflows_for_later_keys_alone_is_as_if_it_were_not(
    name: str, earlier: float, later: float
) -> None:
    """Infinity times a gradient of zero is no number. Features of FAVOR+ are smallest where keys are long."""
    model = trial(name).model()
    q, k = torch.ones(1, 3, R), torch.full((1, 3, R), earlier)
    k[0, 2] = later
    q, k = q.requires_grad_(), k.requires_grad_()
    rows = model.mixing(q, k, torch.tensor([[0, 1]]))
    torch.testing.assert_close(rows, torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0]]]))
    torch.autograd.backward(rows[..., 0].sum())
    assert q.grad is not None and q.grad.isfinite().all()
    assert k.grad is not None and k.grad.isfinite().all()


def test_powers_are_not_lost_below_the_least_float32_or_above_the_largest() -> None:
    """(0.001 and 1000) to the 64th are neither, and yet the rows are those of float64."""
    random = np.random.default_rng(5)
    model = trial("pow:64").model()
    q, k = random.normal(size=(2, 1, 16, R))
    raw = np.tril((q[0] @ k[0].T) ** 64)
    for factor in (1e-3, 1e3):
        found = model.mixing(
            torch.tensor(q * factor, dtype=torch.float32), torch.tensor(k, dtype=torch.float32), torch.arange(16)[None]
        )
        assert found[0].detach().numpy() == pytest.approx(raw / raw.sum(-1, keepdims=True), abs=1e-4)


def test_the_state_is_what_must_be_kept() -> None:
    assert state_bytes(kernels.find("exp"), 16, 32) == 32 * (16 + 64) * 4
    assert state_bytes(kernels.find("elu1"), 16, 32) == 16 * 65 * 4
    assert state_bytes(kernels.find("taylor2"), 16, 999) == 153 * 65 * 4
    assert state_bytes(kernels.find("inline"), 16, 32) == (16 * 64 + 16 + 64 + 1) * 4
