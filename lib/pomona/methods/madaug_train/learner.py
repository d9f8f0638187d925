"""The policy as it is learned, beside the snapshot of the network whose features it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numpy.random import Generator
from torch import Tensor

from pomona.methods.madaug_train.hypergradient import policy_step
from pomona.methods.madaug_train.networks import Network
from pomona.methods.madaug_train.normalisation import normalised, statistics
from pomona.methods.madaug_train.operations.choice import Backend
from pomona.methods.madaug_train.operations.table import Operation
from pomona.methods.madaug_train.policy import Policy
from pomona.methods.madaug_train.recipe import Recipe
from pomona.models.vectors import parts, statistics_of, weights_of

Pair = tuple[Tensor, Tensor]


class Learner:
    """A policy, its optimiser, and the network as it was at the policy's last step.

    Args:
        build: makes a network with the weights to begin from.
        mean, std: of the channels.
        narrow: features that operations are drawn from are computed in bfloat16.
    """

    def __init__(
        self,
        build: Callable[[], Network],
        recipe: Recipe,
        operations: tuple[Operation, ...],
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        narrow: bool,
    ) -> None:
        self._recipe, self._operations, self._mean, self._std, self._narrow = recipe, operations, mean, std, narrow
        self._snapshot = build().requires_grad_(False)
        device = next(self._snapshot.parameters()).device
        self.policy = Policy(self._snapshot.width, len(operations), recipe.policy_hidden, seed=seed).to(device)
        self._weights, self._statistics = weights_of(self._snapshot), statistics_of(self._snapshot)
        self.vector = weights_of(self.policy)
        self._first, self._second = torch.zeros_like(self.vector), torch.zeros_like(self.vector)
        self._adam = torch.optim.Adam(
            self.policy.parameters(), lr=recipe.policy_lr, weight_decay=recipe.policy_decay, foreach=True
        )
        self.resume(0)

    def tensors(self) -> dict[str, Tensor]:
        """All numbers that change, by name."""
        return {
            "policy": self.vector,
            "policy.first": self._first,
            "policy.second": self._second,
            "snapshot": self._weights,
            "snapshot.statistics": self._statistics,
        }

    def resume(self, updates: int) -> None:
        """Go on after so many steps of the policy, with the numbers that `tensors` have."""
        parameters = list(self.policy.parameters())
        moments = zip(parameters, parts(self._first, parameters), parts(self._second, parameters), strict=True)
        for parameter, first, second in moments:
            self._adam.state[parameter] = {
                "step": torch.tensor(float(updates)),
                "exp_avg": first,
                "exp_avg_sq": second,
            }

    def look(self, weights: Tensor, running: Tensor) -> None:
        """Take the network with these weights and statistics for the one whose features are read."""
        self._weights.copy_(weights)
        self._statistics.copy_(running)

    def outlook(self, images: Tensor) -> Pair:
        """Logits and magnitudes, (B, K) each, for uint8 images (B, C, H, W), by the network's snapshot."""
        with torch.autocast(images.device.type, torch.bfloat16, self._narrow):
            return self.outlook_by(self._snapshot, images)

    @torch.no_grad()
    def outlook_by(self, network: Network, images: Tensor) -> Pair:
        """The same by the features of `network`."""
        with statistics(network, "eval"):
            features = network.features(normalised(images, self._mean, self._std))
        with torch.autocast(images.device.type, enabled=False):
            found: Pair = self.policy(features.float())
        return found

    def step(
        self,
        network: Network,
        momentum: Tensor,
        inner: Pair,
        outer: Pair,
        *,
        lr: float,
        backend: Backend,
        randoms: Mapping[str, Generator],
    ) -> float:
        """Move the policy; the norm of its gradient before clipping, and nothing moved where that is not finite.

        Args:
            inner, outer: images, uint8, and labels of the two losses.
            lr: of the network's next step.
        """
        told: dict[str, Any] = {"recipe": self._recipe, "lr": lr, "operations": self._operations, "backend": backend}
        return policy_step(
            network,
            self.policy,
            momentum,
            *inner,
            *outer,
            randoms=randoms,
            mean=self._mean,
            std=self._std,
            optimiser=self._adam,
            **told,
        )
