"""What the probabilities mix, so that the loss of an augmented image has a gradient in them."""

from __future__ import annotations

from torch import Tensor
from torch.func import functional_call
from torch.nn import Module
from torch.nn.functional import cross_entropy


def inner_loss(
    weights: dict[str, Tensor],
    probabilities: Tensor,
    copies: Tensor,
    labels: Tensor,
    *,
    network: Module,
    relaxation: str,
    smoothing: float,
) -> Tensor:
    """L_tr, a scalar: the mean over images of the cross entropy of `network` with `weights`, under all operations.

    loss      ``sum_k p_k loss(copy_k)``: what is expected of one drawn operation
    feature   the loss of ``sum_k p_k features(copy_k)``, as in AdaAug
    image     the loss of ``sum_k p_k copy_k``, as in the released code

    Args:
        probabilities: p, (B, K), which sum to 1.
        copies: each image under each operation, normalised, (B, K, C, H, W).
        labels: (B,).
        relaxation: one of the three.
        smoothing: of the labels.
    """
    if relaxation == "image":
        mixed = (probabilities[:, :, None, None, None] * copies).sum(1)
        return cross_entropy(functional_call(network, weights, (mixed,)), labels, label_smoothing=smoothing)
    logits = functional_call(network, weights, (copies.flatten(0, 1),)).view(*probabilities.shape, -1)
    if relaxation == "feature":
        # The classifier is affine and p sums to 1: it makes of mixed features what mixing its outputs makes.
        mixed = (probabilities[:, :, None] * logits).sum(1)
        return cross_entropy(mixed, labels, label_smoothing=smoothing)
    return (probabilities * _losses(logits, labels, smoothing)).sum(1).mean()


def _losses(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross entropies (B, K) of `logits` (B, K, classes), each of an image's copies against its label."""
    images, copies, _ = logits.shape
    targets = labels.repeat_interleave(copies)
    apart = cross_entropy(logits.flatten(0, 1), targets, label_smoothing=smoothing, reduction="none")
    return apart.view(images, copies)
