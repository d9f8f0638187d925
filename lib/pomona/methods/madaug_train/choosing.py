"""Who decides what is done to an image: a policy, or chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from numpy.random import Generator
from torch import Tensor

from pomona.methods.madaug_train.operations.batched import Chain
from pomona.methods.madaug_train.operations.table import Operation
from pomona.methods.madaug_train.recipe import Recipe
from pomona.methods.madaug_train.sampling import chain, uniform_chain
from pomona.methods.madaug_train.saved import Frozen

Outlook = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Choice:
    """What is chosen from, and how.

    Attributes:
        operations: K of them.
        k: applied to an image.
        temperature: of the softmax that they are drawn from.
        jitter: most that a drawn magnitude is moved by.
        outlook: logits and magnitudes, (B, K) each, of uint8 images (B, C, H, W); None leaves it all to chance.
        uniform: chance draws magnitudes of every strength; otherwise, as a policy that has learned nothing, about 0.5.
    """

    operations: tuple[Operation, ...]
    k: int
    temperature: float
    jitter: float
    outlook: Outlook | None
    uniform: bool = False

    def drawn(self, outlook: tuple[Tensor, Tensor] | None, n: int, randoms: Mapping[str, Generator]) -> Chain:
        """What is done to each of `n` images.

        Args:
            outlook: of these images; None where there is no policy.
            randoms: a generator for each of `sampling.STREAMS`.
        """
        if outlook is None and self.uniform:
            return uniform_chain(n, len(self.operations), self.k, randoms)
        if outlook is None:
            shape = (n, len(self.operations))
            outlook = torch.zeros(shape), torch.full(shape, 0.5)
        return chain(*outlook, k=self.k, temperature=self.temperature, jitter=self.jitter, randoms=randoms)


def choice_of(
    contender: str, recipe: Recipe, operations: tuple[Operation, ...], given: Frozen | None, outlook: Outlook | None
) -> Choice | None:
    """How a contender augments images; None where it does not.

    Args:
        given: the policy of "transfer".
        outlook: of the policy that is learned.
    """
    if contender == "none":
        return None
    if given is not None:
        return Choice(operations, given.k, given.temperature, given.jitter, given.outlook)
    return Choice(operations, recipe.k, recipe.temperature, recipe.jitter, outlook, contender == "uniform")


def part_of(drawn: Chain, rows: slice) -> Chain:
    """What is done to some of the images."""
    return Chain(*(each[rows] for each in (drawn.operations, drawn.magnitudes, drawn.mirrored, drawn.centres)))
