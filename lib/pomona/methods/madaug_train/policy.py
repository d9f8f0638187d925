"""The policy h: from the network's own features of an image, how that image is to be augmented."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from pomona.runtime.seeds import derive

_HIDDEN = 128  # width of a hidden layer, as in the released code


class Policy(nn.Module):
    """One linear layer, or ``hidden`` ReLU layers of 128 before it, with torch's default initialisation.

    Args:
        features: F, numbers that the network makes of an image.
        operations: K.
        hidden: layers before the last.
        seed: the weights to begin from depend on it alone.
    """

    def __init__(self, features: int, operations: int, hidden: int = 0, *, seed: int = 0) -> None:
        super().__init__()
        widths = [features, *[_HIDDEN] * hidden, 2 * operations]
        with torch.random.fork_rng([]):
            torch.manual_seed(derive(seed, "policy"))
            layers: list[nn.Module] = []
            for inside, outside in pairwise(widths):
                layers += [nn.Linear(inside, outside), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the operations and magnitudes in (0, 1), (B, K) each, of features (B, F)."""
        magnitudes, logits = self.layers(features).chunk(2, dim=-1)
        return logits, magnitudes.sigmoid()
