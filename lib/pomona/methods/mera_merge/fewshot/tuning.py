"""How every arm is tuned and tested, whatever of it is tuned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from pomona.methods.mera_merge.fewshot.inputs import Inputs

WEIGHT_DECAY = 0.01
LARGEST_NORM = 1.0
"""Gradients are scaled down to this length."""


class Diverged(Exception):
    """The loss is not finite; the message says when."""


@dataclass(frozen=True)
class Network:
    """Something that gives logits, and what of it is tuned.

    Attributes:
        logits: places of texts to (b, labels).
        groups: what AdamW tunes, each ``{"params": [...], "lr": rate}``.
        penalty: added to the loss while tuning, never while testing.
        modules: what is to be in training mode while tuned, for its dropout.
    """

    logits: Callable[[Sequence[int]], Tensor]
    groups: Sequence[dict[str, object]]
    penalty: Callable[[], Tensor] | None
    modules: Sequence[nn.Module]

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.groups for parameter in group["params"]]  # type: ignore[attr-defined]

    def train(self, mode: bool) -> None:
        for module in self.modules:
            module.train(mode)


def tune(
    network: Network,
    places: Sequence[int],
    labels: Sequence[int],
    *,
    epochs: int,
    batch_size: int,
    random: np.random.Generator,
) -> float:
    """Tune `network` on the texts at `places`, in new order every epoch; returns the mean loss of the last epoch.

    Cross-entropy, AdamW with weight decay 0.01, rates that fall linearly to 0, gradients no longer than 1.

    Raises:
        Diverged: the loss of a step is not finite.
    """
    device = network.parameters()[0].device
    optimiser = AdamW(list(network.groups), weight_decay=WEIGHT_DECAY)
    steps = epochs * math.ceil(len(places) / batch_size)
    schedule = LambdaLR(optimiser, lambda step: 1 - step / steps)
    network.train(True)
    total = 0.0
    for epoch in range(epochs):
        order, total = random.permutation(len(places)), 0.0
        for start in range(0, len(order), batch_size):
            chosen = [places[index] for index in order[start : start + batch_size]]
            targets = torch.tensor([labels[place] for place in chosen], device=device)
            loss = functional.cross_entropy(network.logits(chosen), targets)
            objective = loss if network.penalty is None else loss + network.penalty()
            optimiser.zero_grad()
            torch.autograd.backward(objective)
            nn.utils.clip_grad_norm_(network.parameters(), LARGEST_NORM)
            optimiser.step()
            schedule.step()
            if not math.isfinite(value := float(loss.detach())):
                raise Diverged(f"the loss was not finite in epoch {epoch + 1}")
            total += value * len(chosen)
    network.train(False)
    return total / len(places)


@torch.no_grad()
def test(network: Network, inputs: Inputs, places: Sequence[int], labels: Sequence[int]) -> tuple[float, float]:
    """Accuracy, and mean negative log-likelihood in nats, on the texts at `places`.

    Raises:
        Diverged: the likelihood is not finite.
    """
    right, total = 0, 0.0
    for chosen in inputs.by_length(places):
        logits = network.logits(chosen).double()
        targets = torch.tensor([labels[place] for place in chosen], device=logits.device)
        right += int((logits.argmax(-1) == targets).sum())
        total += float(functional.cross_entropy(logits, targets, reduction="sum"))
    if not math.isfinite(total):
        raise Diverged("the likelihood of the tests was not finite")
    return right / len(places), total / len(places)
