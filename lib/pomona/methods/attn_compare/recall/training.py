"""How every model of the study is trained, whatever its kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from pomona.methods.attn_compare.kernels import Kernel
from pomona.methods.attn_compare.recall.models import RecallModel
from pomona.methods.attn_compare.recall.tasks import IGNORED, TASKS, Sequences
from pomona.runtime.seeds import derive

BATCH = 64
INTERVAL = 250
"""Steps between two looks at held-out sequences."""
HELD_OUT = 1024
STOP = 0.995
RECALLED = 0.99
_RATE = 5e-3


@dataclass(frozen=True)
class Trial:
    """One model to train.

    Attributes:
        pairs: P; sequences have 4P tokens.
        seed: of the run.
        number: tells models of one kernel apart. Models that differ in kernel alone begin with the same parameters, see
            the same batches in the same order, and are judged on the same held-out sequences.
        steps: at most so many; the learning rate is planned for all of them.
    """

    task: str
    pairs: int
    kernel: Kernel
    number: int
    seed: int
    vocabulary: int
    feature_dim: int
    steps: int

    def random(self, purpose: str) -> np.random.Generator:
        """The stream of random numbers for `purpose`, the same for every kernel."""
        name = f"recall/{self.task}/{self.pairs}/{self.vocabulary}/{self.number}/{purpose}"
        return np.random.Generator(np.random.Philox(derive(self.seed, name)))

    def draw(self, random: np.random.Generator, count: int) -> Sequences:
        return TASKS[self.task](random, count, self.pairs, self.vocabulary)

    def model(self) -> RecallModel:
        """The model before its first step."""
        return RecallModel(self.kernel, self.vocabulary, self.feature_dim, 4 * self.pairs, self.random("parameters"))


class Questions(NamedTuple):
    """Sequences, and where in them what is asked.

    Attributes:
        tokens: (n, 4P).
        asked: (n, a), positions, ascending.
        answers: (n, a).
    """

    tokens: Tensor
    asked: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        accuracy: of held-out answers, the share whose token has the largest logit, at the end; None of a failure.
        loss: their mean cross-entropy in nats.
        steps: taken.
        recalled: steps at the first look that found an accuracy of `RECALLED` or more.
        fault: why training broke off.
    """

    accuracy: float | None
    loss: float | None
    steps: int
    recalled: int | None
    fault: str | None = None


def train(trial: Trial, device: str = "cpu") -> Outcome:
    """Train until `STOP` is passed on held-out sequences, looked at every `INTERVAL` steps, or the steps are used up.

    AdamW with weight decay 0.01 and one cycle of learning rates (arXiv 1708.07120): up to 5e-3 in 30 % of the steps,
    then down, the first beta the other way between 0.95 and 0.85. Batches are `BATCH` fresh sequences, the loss is the
    cross-entropy of the answers alone; where it is not finite, training has failed.
    """
    model = trial.model().to(device)
    optimiser = AdamW(model.parameters(), lr=_RATE, fused=True)
    schedule = OneCycleLR(optimiser, _RATE, total_steps=trial.steps)
    held_out = tensors(trial.draw(trial.random("held-out"), HELD_OUT), device)
    random = trial.random("training")
    losses = torch.zeros(INTERVAL, device=device)
    recalled = None
    for start in range(0, trial.steps, INTERVAL):
        block = min(INTERVAL, trial.steps - start)
        fresh = tensors(trial.draw(random, block * BATCH), device)
        for step, (tokens, asked, answers) in enumerate(_batches(fresh)):
            loss = functional.cross_entropy(model(tokens, asked), answers.flatten())
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            losses[step] = loss.detach()
        finite = losses[:block].isfinite()
        if not finite.all():
            step = start + 1 + int(finite.to(torch.uint8).argmin())
            return Outcome(None, None, step, recalled, f"the loss was not finite at step {step}")
        accuracy, mean = judge(model, held_out)
        taken = start + block
        if not math.isfinite(mean):
            return Outcome(None, None, taken, recalled, f"the held-out loss was not finite after {taken} steps")
        if recalled is None and accuracy >= RECALLED:
            recalled = taken
        if accuracy > STOP:
            break
    return Outcome(accuracy, mean, taken, recalled)


@torch.no_grad()
def judge(model: RecallModel, held_out: Questions) -> tuple[float, float]:
    """Accuracy and mean cross-entropy in nats, over all answers."""
    right, total = 0, 0.0
    for tokens, asked, answers in _batches(held_out):
        logits = model(tokens, asked)
        right += int((logits.argmax(-1) == answers.flatten()).sum())
        total += float(functional.cross_entropy(logits, answers.flatten(), reduction="sum"))
    return right / held_out.answers.numel(), total / held_out.answers.numel()


def tensors(sequences: Sequences, device: str) -> Questions:
    """`sequences` as the model takes them."""
    tokens, answers = (torch.from_numpy(part).to(device) for part in sequences)
    due = answers != IGNORED
    asked = due.nonzero()[:, 1].view(len(tokens), -1)
    return Questions(tokens, asked, answers[due].view(len(tokens), -1))


def _batches(questions: Questions) -> Iterator[Questions]:
    for parts in zip(*(torch.split(part, BATCH) for part in questions), strict=True):
        yield Questions(*parts)
