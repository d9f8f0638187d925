"""Batch norm by three statistics, beside torch's own and a formula; over processes, beside one that has all images."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from pomona.methods.madaug_train import normalisation
from pomona.methods.madaug_train.normalisation import BatchNorm, normalised, statistics

Arrays = dict[str, Tensor]


def layer(channels: int = 3) -> BatchNorm:
    found = BatchNorm(channels)
    generator = torch.Generator().manual_seed(1)
    for tensor in (found.weight, found.bias, found.running_mean, found.running_var):
        tensor.data.copy_(torch.rand(channels, generator=generator) + 0.5)
    return found


def torchs(ours: BatchNorm) -> nn.BatchNorm2d:
    theirs = nn.BatchNorm2d(len(ours.weight))
    theirs.load_state_dict({**ours.state_dict(), "num_batches_tracked": torch.tensor(0)})
    return theirs


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1


@pytest.mark.parametrize("training", [True, False])
def test_without_a_word_it_is_torchs_batch_norm(x: Tensor, training: bool) -> None:
    ours = layer().train(training)
    theirs = torchs(ours).train(training)
    for _ in range(3):
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert torch.equal(ours.running_mean, layer().running_mean) is not training


def test_by_the_batch_is_the_formula_and_keeps_nothing(x: Tensor) -> None:
    ours = layer()
    found = x.double().numpy()
    mean, var = found.mean((0, 2, 3), keepdims=True), found.var((0, 2, 3), keepdims=True)
    scale, shift = (each.detach().double().numpy()[:, None, None] for each in (ours.weight, ours.bias))
    expected = (found - mean) / np.sqrt(var + 1e-5) * scale + shift
    with statistics(ours, "batch"):
        np.testing.assert_allclose(ours(x).detach().numpy(), expected, atol=1e-5)
    assert torch.equal(ours.running_mean, layer().running_mean)
    assert torch.equal(ours.running_var, layer().running_var)


def test_statistics_hold_in_their_block_alone_and_nest(x: Tensor) -> None:
    network = nn.Sequential(layer(), nn.Sequential(layer()))
    trained = network(x)
    with statistics(network, "eval"):
        running = network(x)
        with statistics(network, "batch"):
            torch.testing.assert_close(network(x), trained)
        assert torch.equal(network(x), running)
    assert [module.way for module in network.modules() if isinstance(module, BatchNorm)] == [None, None]
    with pytest.raises(ValueError), statistics(network, "eval"):
        raise ValueError
    torch.testing.assert_close(network(x), trained)


@pytest.mark.parametrize("way", ["batch", "eval"])
def test_derivatives_of_first_and_second_order_are_those_of_the_formula(way: normalisation.Way) -> None:
    ours = layer(2).double()
    x = torch.randn(5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = {name: value.detach() for name, value in ours.named_parameters()}
    along = {name: torch.randn_like(value) for name, value in weights.items()}

    def loss(weights: Arrays, x: Tensor) -> Tensor:
        with statistics(ours, way):
            return functional_call(ours, weights, (x,)).pow(3).sum()

    def formula(weights: Arrays, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3)) if way == "batch" else ours.running_mean
        var = x.var((0, 2, 3), correction=0) if way == "batch" else ours.running_var
        centred = (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
        return (centred * weights["weight"][:, None, None] + weights["bias"][:, None, None]).pow(3).sum()

    for argument in (0, 1):
        found = jvp(lambda w, a=argument: grad(loss, argnums=a)(w, x), (weights,), (along,))
        expected = jvp(lambda w, a=argument: grad(formula, argnums=a)(w, x), (weights,), (along,))
        torch.testing.assert_close(found, expected)


def test_processes_that_share_a_batch_have_the_statistics_of_all_of_it(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads stand for two processes, of four images and of two."""
    whole = layer().train()
    both = x.clone().requires_grad_()
    expected = torchs(whole).train()
    (expected(both).pow(3).sum()).backward()
    sums: list[Tensor] = []
    barrier, lock = threading.Barrier(2), threading.Lock()

    def summed(own: Tensor) -> Tensor:
        with lock:
            sums.append(own.detach().clone())
        barrier.wait(10)
        total = sums[0] + sums[1]
        if barrier.wait(10) == 0:
            sums.clear()
        barrier.wait(10)
        return total

    monkeypatch.setattr(normalisation, "_summed", summed)
    monkeypatch.setattr(normalisation, "_processes", lambda: 2)

    def process(part: Tensor) -> tuple[Tensor, BatchNorm]:
        own, mine = part.clone().requires_grad_(), layer().train()
        mine(own).pow(3).sum().backward()
        assert own.grad is not None
        return own.grad, mine

    with ThreadPoolExecutor(2) as pool:
        (first, ours), (second, other) = pool.map(process, (x[:4], x[4:]))
    torch.testing.assert_close(torch.cat([first, second]), both.grad, atol=1e-4, rtol=1e-4)
    for name in ("weight", "bias"):
        gradients = [getattr(each, name).grad for each in (ours, other)]
        torch.testing.assert_close(gradients[0] + gradients[1], getattr(expected, name).grad, atol=1e-3, rtol=1e-4)
    for each in (ours, other):
        torch.testing.assert_close(each.running_mean, expected.running_mean)
        torch.testing.assert_close(each.running_var, expected.running_var)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_brought_to_mean_0_and_deviation_1(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, channels, 5, 4), dtype=np.uint8)
    share = images / 255
    mean, std = share.mean((0, 2, 3)), share.std((0, 2, 3))
    found = normalised(torch.from_numpy(images), tuple(mean), tuple(std))
    assert found.dtype is torch.float32
    np.testing.assert_allclose(found.numpy(), (share - mean[:, None, None]) / std[:, None, None], atol=1e-5)
    np.testing.assert_allclose(found.numpy().std((0, 2, 3)), 1, atol=1e-5)
