"""Which images a step sees, and how far it goes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pomona.methods.madaug_train.recipe import Recipe
from pomona.runtime.seeds import derive


@dataclass(frozen=True)
class Schedule:
    """The steps of a training that sees `images` images in each epoch.

    The last batch of an epoch holds what is left, unless that is one image, of which no statistics can be made.
    """

    recipe: Recipe
    images: int
    seed: int

    @property
    def batches(self) -> int:
        """Steps of an epoch."""
        whole, left = divmod(self.images, self.recipe.train_batch)
        return max(1, whole + (left > 1))

    @property
    def steps(self) -> int:
        return self.recipe.epochs * self.batches

    def moves_policy(self, step: int) -> bool:
        """Whether the policy takes a step before this one of the network."""
        return step % self.recipe.policy_every == 0 and step >= self.recipe.policy_start * self.batches

    @property
    def updates(self) -> int:
        """Steps of the policy."""
        every, first = self.recipe.policy_every, self.recipe.policy_start * self.batches
        return max(0, -(-self.steps // every) - -(-first // every))

    def batch(self, step: int) -> NDArray[np.int64]:
        """Places of the images of a step: each image comes once in an epoch, in an order of its own."""
        epoch, number = divmod(step, self.batches)
        size = self.recipe.train_batch
        return _order(self.seed, epoch, self.images)[number * size : (number + 1) * size]

    def rate(self, step: int) -> float:
        """Step size of SGD: linear over the warm-up up to a peak of ``--warmup-factor`` times ``--lr``, then a cosine.

        The warm-up begins at ``--lr``, as in the released code, and at 0 where it ends there.
        """
        peak = self.recipe.lr * self.recipe.warmup_factor
        warmup = self.recipe.warmup_epochs * self.batches
        if step < warmup:
            begin = self.recipe.lr if self.recipe.warmup_factor != 1 else 0.0
            return begin + (peak - begin) * (step + 1) / warmup
        along = (step - warmup) / (self.steps - warmup)
        return self.recipe.min_lr + (peak - self.recipe.min_lr) * (1 + math.cos(math.pi * along)) / 2


@lru_cache(maxsize=1)
def _order(seed: int, epoch: int, images: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=derive(seed, f"order/{epoch}"))).permutation(images)
