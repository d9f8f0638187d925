"""Acceptance check A2: the hypergradient is that of the real step, by autograd through it and by taking the step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, cross_entropy

from pomona.methods.madaug_train.config import Config
from pomona.methods.madaug_train.hypergradient import MOMENTUM, hypergradient, policy_step
from pomona.methods.madaug_train.networks import Network, build
from pomona.methods.madaug_train.normalisation import BatchNorm, normalised, statistics
from pomona.methods.madaug_train.operations.table import OPERATIONS
from pomona.methods.madaug_train.policy import Policy
from pomona.methods.madaug_train.recipe import Recipe, recipe

B, K, V, C, CLASSES, SIDE = 3, 17, 5, 2, 4, 6
LR, DECAY = 0.3, 5e-2
WAYS = [(relaxation, way) for relaxation in ("loss", "feature", "image") for way in ("batch", "eval")]


class Small(Network):
    """Two convolutions with batch norm, one of them with stride 2, and a linear layer."""

    def __init__(self) -> None:
        super().__init__(6, CLASSES)
        self.first, self.norm = nn.Conv2d(C, 5, 3, padding=1, bias=False), BatchNorm(5)
        self.second, self.last = nn.Conv2d(5, 6, 3, 2, 1, bias=False), BatchNorm(6)

    def maps(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.norm(self.first(x)).relu())).relu()


class Step:
    """A network in float64 about to take a step, and what the step and the losses around it see."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.network = Small().double()
        for name, value in self.network.state_dict().items():
            drawn = self.random(*value.shape) * 0.4
            value.copy_(drawn.abs() + 0.5 if name.endswith(("var", "norm.weight", "last.weight")) else drawn)
        self.momentum = self.random(sum(each.numel() for each in self.network.parameters())) * 0.1
        self.logits, self.copies = self.random(B, K), self.random(B, K, C, SIDE, SIDE)
        self.labels, self.val_labels = torch.tensor([0, 3, 1]), torch.tensor([2, 0, 1, 3, 3])
        self.val_images = self.random(V, C, SIDE, SIDE)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def found(self, told: Recipe, p: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with statistics(self.network, told.inner_bn):  # type: ignore[arg-type]
            return hypergradient(
                self.network,
                self.momentum,
                self.logits.softmax(-1) if p is None else p,
                self.copies,
                self.labels,
                self.val_images,
                self.val_labels,
                recipe=told,
                lr=LR,
            )

    # The rest is written apart from the library, by torch's functions alone.

    def outputs(self, weights: dict[str, Tensor], x: Tensor, way: str) -> tuple[Tensor, Tensor]:
        """Features and logits."""
        for conv, norm, stride in (("first", "norm", 1), ("second", "last", 2)):
            x = conv2d(x, weights[f"{conv}.weight"], stride=stride, padding=1)
            running = (None, None) if way == "batch" else getattr(self.network, norm)._buffers.values()
            x = batch_norm(x, *running, weights[f"{norm}.weight"], weights[f"{norm}.bias"], way == "batch").relu()
        features = x.mean((2, 3))
        return features, features @ weights["classifier.weight"].T + weights["classifier.bias"]

    def training_loss(self, weights: dict[str, Tensor], p: Tensor, copies: Tensor, told: Recipe) -> Tensor:
        smoothing, way = told.label_smoothing, told.inner_bn
        if told.relaxation == "image":
            logits = self.outputs(weights, torch.einsum("bk,bkchw->bchw", p, copies), way)[1]
            return cross_entropy(logits, self.labels, label_smoothing=smoothing)
        features, logits = self.outputs(weights, copies.flatten(0, 1), way)
        if told.relaxation == "feature":
            mixed = torch.einsum("bk,bkf->bf", p, features.view(B, K, -1))
            logits = mixed @ weights["classifier.weight"].T + weights["classifier.bias"]
            return cross_entropy(logits, self.labels, label_smoothing=smoothing)
        total = torch.zeros((), dtype=torch.float64)
        for image in range(B):
            for k in range(K):
                one = logits.view(B, K, -1)[image, k][None]
                total = total + p[image, k] * cross_entropy(one, self.labels[image][None], label_smoothing=smoothing)
        return total / B

    def unrolled(self, told: Recipe) -> tuple[Tensor, Tensor]:
        """The gradient in logits of the policy and in copies, by autograd through the step."""
        logits, copies = self.logits.clone().requires_grad_(), self.copies.clone().requires_grad_()
        weights = {name: each.detach().clone().requires_grad_() for name, each in self.network.named_parameters()}
        loss = self.training_loss(weights, logits.softmax(-1), copies, told)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        flat = torch.cat([each.flatten() for each in weights.values()])
        slope = torch.cat([each.flatten() for each in gradients])
        moved = flat - LR * (slope + 0.9 * self.momentum + DECAY * flat)
        parts = moved.split([each.numel() for each in weights.values()])
        stepped = {name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)}
        outer = cross_entropy(self.outputs(stepped, self.val_images, told.inner_bn)[1], self.val_labels)
        by_logits, by_copies = torch.autograd.grad(outer, (logits, copies))
        return by_logits, by_copies

    def after_a_real_step(self, logits: Tensor, copies: Tensor, told: Recipe) -> float:
        """The validation loss after torch's SGD has taken the step."""
        weights = {name: nn.Parameter(each.detach().clone()) for name, each in self.network.named_parameters()}
        sgd = torch.optim.SGD(weights.values(), lr=LR, momentum=0.9, weight_decay=DECAY)
        for part, each in zip(
            self.momentum.split([w.numel() for w in weights.values()]), weights.values(), strict=True
        ):
            sgd.state[each] = {"momentum_buffer": part.view_as(each).clone()}
        self.training_loss(weights, logits.softmax(-1), copies, told).backward()
        sgd.step()
        with torch.no_grad():
            return float(cross_entropy(self.outputs(weights, self.val_images, told.inner_bn)[1], self.val_labels))


def told(**changed: Any) -> Recipe:
    settled = recipe(Config(), "digits")
    return dataclasses.replace(settled, weight_decay=DECAY, label_smoothing=0.1, **changed)


def through_softmax(logits: Tensor, by_probability: Tensor) -> Tensor:
    """What a gradient in probabilities is in logits."""
    p = logits.softmax(-1)
    return p * (by_probability - (p * by_probability).sum(-1, keepdim=True))


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def step() -> Step:
    return Step()


@pytest.mark.parametrize("route", ["jvp", "unrolled"])
@pytest.mark.parametrize(("relaxation", "way"), WAYS)
def test_both_routes_are_autograd_through_the_step(step: Step, relaxation: str, way: str, route: str) -> None:
    asked = told(relaxation=relaxation, inner_bn=way, hypergradient=route)
    by_logits, by_copies = step.unrolled(asked)
    by_p, by_c = step.found(asked)
    assert by_p.shape == (B, K) and by_c.shape == step.copies.shape
    assert apart(through_softmax(step.logits, by_p), by_logits) <= 1e-10
    assert apart(by_c, by_copies) <= 1e-10


@pytest.mark.parametrize(("relaxation", "way"), WAYS)
def test_a_real_step_changes_the_validation_loss_as_foretold(step: Step, relaxation: str, way: str) -> None:
    """By central differences in a logit of the policy and, straight through every pixel, in a magnitude."""
    asked, h = told(relaxation=relaxation, inner_bn=way), 1e-5
    by_p, by_c = step.found(asked)
    by_logits, by_magnitudes = through_softmax(step.logits, by_p), by_c.sum((2, 3, 4))
    for image, k in ((0, 0), (1, 9), (2, 16)):
        change = torch.zeros(B, K, dtype=torch.float64)
        change[image, k] = h
        pixels = change[:, :, None, None, None]
        logit = [step.after_a_real_step(step.logits + sign * change, step.copies, asked) for sign in (1, -1)]
        magnitude = [step.after_a_real_step(step.logits, step.copies + sign * pixels, asked) for sign in (1, -1)]
        assert abs((logit[0] - logit[1]) / (2 * h) - float(by_logits[image, k])) <= 1e-5 * float(by_logits.abs().max())
        expected = (magnitude[0] - magnitude[1]) / (2 * h)
        assert abs(expected - float(by_magnitudes[image, k])) <= 1e-5 * float(by_magnitudes.abs().max())


def test_expected_losses_give_one_forward_product(step: Step) -> None:
    """Section 1.3's closed form: ``dL_val / dp_ik = -(a / B) <grad_w l_ik, v>``, with a gradient for each loss."""
    asked = told(relaxation="loss", inner_bn="batch")
    weights = {name: each.detach().clone().requires_grad_() for name, each in step.network.named_parameters()}
    names = list(weights)
    p = step.logits.softmax(-1)
    slopes = torch.autograd.grad(step.training_loss(weights, p, step.copies, asked), list(weights.values()))
    parts = step.momentum.split([each.numel() for each in weights.values()])
    stepped = {
        name: (weights[name] - LR * (slope + MOMENTUM * part.view_as(slope) + DECAY * weights[name])).detach()
        for name, slope, part in zip(names, slopes, parts, strict=True)
    }
    for each in stepped.values():
        each.requires_grad_()
    outer = cross_entropy(step.outputs(stepped, step.val_images, "batch")[1], step.val_labels)
    v = torch.autograd.grad(outer, list(stepped.values()))
    logits = step.outputs(weights, step.copies.flatten(0, 1), "batch")[1].view(B, K, -1)
    expected = torch.empty(B, K, dtype=torch.float64)
    for image in range(B):
        for k in range(K):
            loss = cross_entropy(logits[image, k][None], step.labels[image][None], label_smoothing=0.1)
            gradient = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
            expected[image, k] = -LR / B * sum(float((g * d).sum()) for g, d in zip(gradient, v, strict=True))
    assert apart(step.found(asked)[0], expected) <= 1e-10


# --- the step of the policy ------------------------------------------------------------------------------------------


class Brightening:
    """A backend whose operation k adds lam times ``gain[k]`` to all pixels, and which knows what it was given."""

    def __init__(self) -> None:
        self.gain = torch.arange(len(OPERATIONS)) * 4.0
        self.given: list[tuple[Tensor, Tensor, Tensor]] = []

    def every(self, images: Tensor, _: Any, magnitudes: Tensor, mirrored: Tensor, centres: Tensor) -> Tensor:
        self.given.append((magnitudes, mirrored, centres))
        added = (self.gain * magnitudes)[:, :, None, None, None]
        return (images[:, None] + added).round().to(torch.uint8)


MEAN, STD = (0.4, 0.5), (0.2, 0.3)


class Taken:
    """One step of a policy, by gradient descent with step 1, so that what it moves by is its gradient."""

    def __init__(self, seed: int = 0, **changed: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.network = Small().train()
        for each in self.network.parameters():
            each.data = torch.randn(each.shape, generator=generator) * 0.5
        self.before = {name: each.clone() for name, each in self.network.state_dict().items()}
        self.images = torch.randint(0, 100, (B, C, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        self.val_images = torch.randint(0, 255, (V, C, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        self.labels, self.val_labels = torch.tensor([0, 3, 1]), torch.tensor([2, 0, 1, 3, 3])
        self.momentum = torch.zeros(sum(each.numel() for each in self.network.parameters()))
        self.policy = Policy(6, len(OPERATIONS), seed=seed)
        self.start = [each.detach().clone() for each in self.policy.parameters()]
        self.recipe = told(**changed)
        self.backend = Brightening()
        self.norm = math.nan

    def take(self, lr: float = LR) -> Taken:
        self.norm = policy_step(
            self.network,
            self.policy,
            self.momentum,
            self.images,
            self.labels,
            self.val_images,
            self.val_labels,
            recipe=self.recipe,
            lr=lr,
            operations=OPERATIONS,
            backend=self.backend,
            randoms={name: np.random.Generator(np.random.Philox(5)) for name in ("mirrored", "centres")},
            mean=MEAN,
            std=STD,
            optimiser=torch.optim.SGD(self.policy.parameters(), lr=1.0),
        )
        return self

    def moved(self) -> list[Tensor]:
        return [old - new.detach() for old, new in zip(self.start, self.policy.parameters(), strict=True)]

    def gradient(self) -> list[Tensor]:
        return [each.grad.double() for each in self.policy.parameters() if each.grad is not None]

    def expected(self, gain: Tensor | float = 1.0) -> list[Tensor]:
        """The gradient of the policy's weight and bias by the chain rule, from the hypergradient.

        Args:
            gain: what a magnitude adds to normalised pixels, (B, K, C).
        """
        with torch.no_grad(), statistics(self.network, "eval"):
            features = self.network.features(normalised(self.images, MEAN, STD)).double()
        weight, bias = (each.double() for each in self.start)
        magnitudes, logits = (features @ weight.T + bias).chunk(2, dim=-1)
        magnitudes = magnitudes.sigmoid()
        nowhere = torch.empty(0)
        made = self.backend.every(self.images, OPERATIONS, magnitudes.float(), nowhere, nowhere)
        with statistics(self.network, self.recipe.inner_bn):  # type: ignore[arg-type]
            by_p, by_c = hypergradient(
                self.network,
                self.momentum,
                logits.softmax(-1).float(),
                normalised(made.flatten(0, 1), MEAN, STD).unflatten(0, made.shape[:2]),
                self.labels,
                normalised(self.val_images, MEAN, STD),
                self.val_labels,
                recipe=self.recipe,
                lr=LR,
            )
        by_magnitude = (by_c.double().sum((3, 4)) * gain).sum(2)
        for k, operation in enumerate(OPERATIONS):
            if operation.name in ("AutoContrast", "Invert", "Equalize", "Flip", "Identity"):
                by_magnitude[:, k] = 0
        by_magnitude = by_magnitude * magnitudes * (1 - magnitudes)
        upstream = torch.cat([by_magnitude, through_softmax(logits, by_p.double())], dim=-1)
        return [upstream.T @ features, upstream.sum(0)]


@pytest.mark.parametrize("way", ["batch", "eval"])
def test_the_policy_moves_along_the_chain_rule_and_what_it_reads_is_constant(way: str) -> None:
    taken = Taken(inner_bn=way).take()
    expected = taken.expected()
    for found, each in zip(taken.gradient(), expected, strict=True):
        assert apart(found, each) <= 1e-4
    norm = math.sqrt(sum(float(each.square().sum()) for each in expected))
    assert abs(taken.norm / norm - 1) <= 1e-4 and taken.norm < 5


def test_the_network_is_left_as_it_was() -> None:
    taken = Taken().take()
    assert taken.network.training
    assert all(torch.equal(each, taken.before[name]) for name, each in taken.network.state_dict().items())
    assert all(each.grad is None for each in taken.network.parameters())
    assert all(layer.way is None for layer in taken.network.modules() if isinstance(layer, BatchNorm))


def test_a_large_gradient_is_clipped_to_five_and_told_in_full() -> None:
    taken = Taken().take(lr=1e4)
    norm = math.sqrt(sum(float(each.square().sum()) for each in taken.moved()))
    assert taken.norm > 50 and abs(norm - 5) <= 1e-3


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    taken = Taken()
    next(taken.network.parameters()).data[:] = math.nan
    assert not math.isfinite(taken.take().norm)
    assert all((each == 0).all() for each in taken.moved())


def test_differences_weigh_pixels_by_what_the_operation_does_to_them() -> None:
    taken = Taken(magnitude_grad="finite-difference")
    taken.start[1][:4] = torch.tensor([4.0, -4.0, 3.0, -3.0])  # magnitudes so near 0 and 1 that one side is cut short
    for parameter, given in zip(taken.policy.parameters(), taken.start, strict=True):
        parameter.data = given.clone()
    taken.backend.gain[:4] = 100.0
    taken.take()
    middle, above, below = (each[0] for each in taken.backend.given)
    torch.testing.assert_close(above, (middle + 0.1).clamp(max=1))
    torch.testing.assert_close(below, (middle - 0.1).clamp(min=0))
    for again in taken.backend.given[1:]:  # the same signs and holes
        assert all(torch.equal(one, other) for one, other in zip(taken.backend.given[0][1:], again[1:], strict=True))

    def pixels(magnitudes: Tensor) -> Tensor:  # a whole number is added to all of them: bytes are
        return (taken.backend.gain * magnitudes)[:, :, None].round() / 255 / torch.tensor(STD)

    gain = (pixels(above) - pixels(below)) / (above - below)[:, :, None]
    assert gain.max() > 0.5
    for found, each in zip(taken.gradient(), taken.expected(gain), strict=True):
        assert apart(found, each) <= 1e-4


def test_signs_and_holes_are_the_streams() -> None:
    given = Taken().take().backend.given[0]
    random = np.random.Generator(np.random.Philox(5))
    assert np.array_equal(given[1].numpy(), random.random((B, len(OPERATIONS))) < 0.5)
    random = np.random.Generator(np.random.Philox(5))
    assert np.array_equal(given[2].numpy(), random.random((B, len(OPERATIONS), 2), dtype=np.float32))


def test_one_channel_and_the_real_operations_give_both_routes_the_same_gradient() -> None:
    from pomona.methods.madaug_train.operations import batched

    network = build("cnn-small", 1, CLASSES, 8, 0)
    images = torch.randint(0, 256, (B, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels, weights = torch.tensor([0, 1, 2]), sum(each.numel() for each in network.parameters())
    moved = []
    for route in ("jvp", "unrolled"):
        policy = Policy(network.width, len(OPERATIONS), hidden=1, seed=2)
        policy_step(
            network,
            policy,
            torch.zeros(weights),
            images,
            labels,
            images,
            labels,
            recipe=told(hypergradient=route),
            lr=LR,
            operations=OPERATIONS,
            backend=batched,
            randoms={name: np.random.Generator(np.random.Philox(5)) for name in ("mirrored", "centres")},
            mean=(0.5,),
            std=(0.3,),
            optimiser=torch.optim.SGD(policy.parameters(), lr=1.0),
        )
        moved.append(torch.cat([each.grad.flatten() for each in policy.parameters() if each.grad is not None]))
    assert moved[0].norm() > 0 and apart(*moved) <= 1e-4
