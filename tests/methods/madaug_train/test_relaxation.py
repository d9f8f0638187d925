"""The three inner losses, by NumPy in float64 from what each mixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pomona.methods.madaug_train.networks import build
from pomona.methods.madaug_train.normalisation import statistics
from pomona.methods.madaug_train.relaxation import inner_loss

IMAGES, OPERATIONS, CLASSES = 3, 4, 5


def cross_entropies(logits: NDArray[np.float64], labels: NDArray[np.int64], smoothing: float) -> NDArray[np.float64]:
    """(B,), against (1 - smoothing) of the label and the rest shared by all classes."""
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = np.full(logits.shape, smoothing / CLASSES)
    targets[np.arange(len(labels)), labels] += 1 - smoothing
    return -(targets * logs).sum(-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("relaxation", ["loss", "feature", "image"])
def test_what_is_mixed_is_what_the_relaxation_names(relaxation: str, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    network = build("cnn-small", 1, CLASSES, 6, 0).double()
    copies = torch.randn(IMAGES, OPERATIONS, 1, 6, 6, generator=generator, dtype=torch.float64)
    p = torch.randn(IMAGES, OPERATIONS, generator=generator, dtype=torch.float64).softmax(-1)
    labels = torch.tensor([4, 0, 2])
    weights = {name: torch.randn_like(each) * 0.2 for name, each in network.named_parameters()}
    with statistics(network, "eval"):
        found = inner_loss(weights, p, copies, labels, network=network, relaxation=relaxation, smoothing=smoothing)
        network.load_state_dict(weights, strict=False)
        shares = p.numpy()
        if relaxation == "image":
            mixed = torch.from_numpy(np.einsum("bk,bkchw->bchw", shares, copies.numpy()))
            logits = network(mixed).detach().numpy()
            expected = cross_entropies(logits, labels.numpy(), smoothing).mean()
        else:
            features = network.features(copies.flatten(0, 1)).detach().numpy().reshape(IMAGES, OPERATIONS, -1)
            weight, bias = (each.detach().numpy() for each in network.classifier.parameters())
            if relaxation == "feature":
                logits = np.einsum("bk,bkf->bf", shares, features) @ weight.T + bias
                expected = cross_entropies(logits, labels.numpy(), smoothing).mean()
            else:
                logits = (features @ weight.T + bias).reshape(-1, CLASSES)
                apart = cross_entropies(logits, np.repeat(labels.numpy(), OPERATIONS), smoothing)
                expected = (shares * apart.reshape(IMAGES, OPERATIONS)).sum() / IMAGES
    assert abs(float(found) - expected) <= 1e-12
