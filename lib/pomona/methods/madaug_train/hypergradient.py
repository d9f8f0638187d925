"""What: how the policy would have to change for the network's next step to serve the validation images better.

The network takes one step of SGD on images under all operations, ``w' = w - a (grad L_tr(w) + beta m + wd w)``, and so
the validation loss depends on their probabilities p and on the copies c that operations make of them:

    d L_val(w') / d(p, c)  =  -a d/d(p, c) <grad_w L_tr(w; p, c), v>,    v = grad L_val at w'

which is the derivative of L_tr's gradient in (p, c) when w moves along v. ``jvp`` computes it so, with dual numbers in
the reverse pass: no graph of a gradient is held. ``unrolled`` differentiates through the step. They are equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.random import Generator
from torch import Tensor
from torch.autograd import forward_ad, grad
from torch.func import functional_call
from torch.nn import Module
from torch.nn.functional import cross_entropy

from pomona.methods.madaug_train.networks import Network
from pomona.methods.madaug_train.normalisation import normalised, statistics
from pomona.methods.madaug_train.operations.table import Operation
from pomona.methods.madaug_train.policy import Policy
from pomona.methods.madaug_train.recipe import Recipe
from pomona.methods.madaug_train.relaxation import inner_loss
from pomona.methods.madaug_train.sampling import signs_and_centres

MOMENTUM = 0.9
"""Of SGD, in the real step and in the one that the policy looks ahead by."""

_CLIP = 5.0  # norm of the policy's gradient
_REACH = 0.1  # by how much magnitudes are moved for differences: less would not shift 8 pixels by one


def policy_step(
    network: Network,
    policy: Policy,
    momentum: Tensor,
    images: Tensor,
    labels: Tensor,
    val_images: Tensor,
    val_labels: Tensor,
    *,
    recipe: Recipe,
    lr: float,
    operations: Sequence[Operation],
    backend: Any,
    randoms: Mapping[str, Generator],
    mean: Sequence[float],
    std: Sequence[float],
    optimiser: torch.optim.Optimizer,
) -> float:
    """Move `policy` by one step of `optimiser`.

    The network's features of an image are given to the policy as they are: no gradient goes through them (in the
    released code one does), as none will in the step that the network then takes.

    Args:
        network: its weights, buffers and mode are left alone.
        momentum: the buffer of SGD, (P,), in the order of the network's parameters.
        images: (B, C, H, W) of the inner step, uint8, each of which is put under every operation.
        val_images: (V, C, H, W) of the outer loss, uint8.
        lr: a, of the network's next step.
        backend: `batched` or `by_pillow`.
        randoms: generators for the streams "mirrored" and "centres".
        mean, std: of the channels.

    Returns:
        The norm of the policy's gradient before it was clipped to 5. Where it is not finite, nothing was moved.
    """
    with torch.no_grad(), statistics(network, "eval"):
        features = network.features(normalised(images, mean, std))
    logits, magnitudes = policy(features)
    probabilities = logits.softmax(-1)
    mirrored, centres = signs_and_centres((len(images), len(operations)), randoms, images.device)

    def copies(magnitudes: Tensor) -> Tensor:
        made = backend.every(images, operations, magnitudes, mirrored, centres)
        return normalised(made.flatten(0, 1), mean, std).view(made.shape)

    given = magnitudes.detach()
    with statistics(network, "batch" if recipe.inner_bn == "batch" else "eval"):
        by_probability, by_copy = hypergradient(
            network,
            momentum,
            probabilities.detach(),
            copies(given),
            labels,
            normalised(val_images, mean, std),
            val_labels,
            recipe=recipe,
            lr=lr,
        )
    if recipe.magnitude_grad == "straight-through":
        by_magnitude = by_copy.sum((2, 3, 4))
    else:
        above, below = (given + _REACH).clamp(max=1), (given - _REACH).clamp(min=0)
        by_magnitude = (by_copy * (copies(above) - copies(below))).sum((2, 3, 4)) / (above - below)
    matters = torch.tensor([operation.neutral is not None for operation in operations], device=images.device)
    optimiser.zero_grad()
    torch.autograd.backward([probabilities, magnitudes], [by_probability, by_magnitude * matters])
    norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), _CLIP))
    if math.isfinite(norm):
        optimiser.step()
    return norm


def hypergradient(
    network: Module,
    momentum: Tensor,
    probabilities: Tensor,
    copies: Tensor,
    labels: Tensor,
    val_images: Tensor,
    val_labels: Tensor,
    *,
    recipe: Recipe,
    lr: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of the validation loss after one step, in p, (B, K), and in the copies, (B, K, C, H, W).

    Args:
        network: its batch norm is to be in the mode that both losses are computed in.
        momentum: the buffer of SGD, (P,), in the order of the network's parameters.
        probabilities: p, (B, K).
        copies: each image under each operation, normalised, (B, K, C, H, W).
        val_images: (V, C, H, W), normalised.
        lr: a.
    """
    unrolled = recipe.hypergradient == "unrolled"
    probabilities = probabilities.detach().requires_grad_()
    copies = _channels_last(copies.flatten(0, 1)).view(copies.shape).requires_grad_()
    val_images = _channels_last(val_images)
    weights = {name: _channels_last(each).requires_grad_() for name, each in network.named_parameters()}
    parts = torch.split(momentum, [each.numel() for each in weights.values()])
    buffers = [part.view_as(each) for part, each in zip(parts, weights.values(), strict=True)]

    def training_loss(weights: dict[str, Tensor]) -> Tensor:
        return inner_loss(
            weights,
            probabilities,
            copies,
            labels,
            network=network,
            relaxation=recipe.relaxation,
            smoothing=recipe.label_smoothing,
        )

    gradients = grad(training_loss(weights), list(weights.values()), create_graph=unrolled)
    with torch.set_grad_enabled(unrolled):
        stepped = {
            name: weight - lr * (gradient + MOMENTUM * buffer + recipe.weight_decay * weight)
            for (name, weight), gradient, buffer in zip(weights.items(), gradients, buffers, strict=True)
        }
    if not unrolled:
        for weight in stepped.values():
            weight.requires_grad_()
    loss = cross_entropy(functional_call(network, stepped, (val_images,)), val_labels)
    if unrolled:
        by_probability, by_copy = grad(loss, (probabilities, copies))
        return by_probability, by_copy
    directions = grad(loss, list(stepped.values()))
    with forward_ad.dual_level():
        moving = {
            name: forward_ad.make_dual(weight.detach(), direction)  # type: ignore[no-untyped-call]
            for (name, weight), direction in zip(weights.items(), directions, strict=True)
        }
        found = grad(training_loss(moving), (probabilities, copies))
        by_probability, by_copy = (forward_ad.unpack_dual(each).tangent for each in found)  # type: ignore[no-untyped-call]
    return -lr * by_probability, -lr * by_copy


def _channels_last(tensor: Tensor) -> Tensor:
    """`tensor` apart from its history and, if images or kernels on a CPU, with the channels last in memory: faster.

    By its strides, since torch leaves those of one channel as they are, and then all that follows lies the other way.
    """
    if tensor.device.type != "cpu" or tensor.ndim != 4:
        return tensor.detach()
    _, channels, height, width = tensor.shape
    strides = (channels * height * width, 1, width * channels, channels)
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor.detach())
