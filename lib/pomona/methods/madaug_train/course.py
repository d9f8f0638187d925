"""The steps of a training: what the network sees, what becomes of its weights, and when the policy moves.

A step's random numbers depend on the seed and the step alone, each stream for itself. So interruptions do not show in
the weights, on a CPU not in a single bit; and contenders with one seed see the same batches from the same beginning.
Several processes share the images of a batch, and differ from one in the order of sums alone; the policy's step is
computed by each of them alike.

All weights are one vector, of which the parameters of the network are views, and so are the statistics of batch norm.
So the optimiser, the snapshot, what processes exchange and what is kept on the disk are a few operations each, however
many layers there are.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from pomona.errors import CheckFailed
from pomona.methods.madaug_train import record
from pomona.methods.madaug_train.choosing import Choice, choice_of, part_of
from pomona.methods.madaug_train.curriculum import probability
from pomona.methods.madaug_train.data import Prepared
from pomona.methods.madaug_train.feed import Feed
from pomona.methods.madaug_train.hypergradient import MOMENTUM
from pomona.methods.madaug_train.learner import Learner
from pomona.methods.madaug_train.networks import build
from pomona.methods.madaug_train.operations.choice import backend
from pomona.methods.madaug_train.operations.table import chosen
from pomona.methods.madaug_train.recipe import Recipe
from pomona.methods.madaug_train.sampling import STREAMS, coins
from pomona.methods.madaug_train.saved import Frozen
from pomona.methods.madaug_train.schedule import Schedule
from pomona.methods.madaug_train.splits import Parts
from pomona.methods.madaug_train.state import State
from pomona.methods.madaug_train.table import HISTORY
from pomona.models.vectors import statistics_of, weights_of
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Progress

_EVERY = 20.0  # seconds from one written state to the next
_LOOK = 50  # steps after which it is seen whether all is finite: on a GPU it is waited for

_LOSS, _RIGHT, _NORM, _AUGMENTED, _POLICY = range(5)
"""What is noted of each step: summed loss, images told right, norm of the gradient, images augmented, and the norm of
the policy's gradient, 0 where it was not moved."""


class Course:
    """The steps of one training.

    Args:
        contender: as `training.Job` has it.
        given: the policy of "transfer".

    Attributes:
        parts: the parts of the images.
        state: where the training has got to.
    """

    def __init__(
        self,
        contender: str,
        seed: int,
        recipe: Recipe,
        prepared: Prepared,
        parts: Parts,
        given: Frozen | None,
        runtime: Runtime,
    ) -> None:
        self._contender, self._seed, self._recipe, self._runtime = contender, seed, recipe, runtime
        self._prepared, self.parts, self._given = prepared, parts, given
        self._places = np.concatenate([parts.train, parts.val]) if contender == "train+val" else parts.train
        self._feed = Feed(prepared, parts, recipe, seed, runtime)
        self._schedule = Schedule(recipe, len(self._places), seed)
        _, channels, height, width = prepared.images.shape
        made = partial(build, recipe.net, channels, len(prepared.names), min(height, width), seed)
        self._network = made().to(runtime.device).train()
        self._parameters = list(self._network.parameters())
        self._weights, self._statistics = weights_of(self._network), statistics_of(self._network)
        self._momentum = torch.zeros_like(self._weights)
        self._narrow = runtime.dtype is torch.bfloat16
        self._backend = backend(recipe.backend, runtime.device, channels, height, width)
        operations = chosen(recipe.ops) if given is None else given.operations
        self._learner = (
            Learner(lambda: made().to(runtime.device), recipe, operations, seed, parts.mean, parts.std, self._narrow)
            if contender == "madaug"
            else None
        )
        outlook = self._learner.outlook if self._learner is not None else None
        self._choice = choice_of(contender, recipe, operations, given, outlook)
        own = record.sample(prepared.labels[parts.train], self._feed.random("sample"))
        self._watched = parts.train[own]
        self.state = State(self._tensors())
        self._kept: int | None = None

    def run(self, checkpoint: Path | None, progress: Progress) -> None:
        """Take the steps that are still to be taken, and keep the state in `checkpoint` meanwhile.

        Raises:
            CheckFailed: a loss or a gradient is not finite.
            MissingError, UsageError, OutputError: as `State` does on `checkpoint`.
        """
        state, steps = self.state, self._schedule.steps
        fingerprint = self._fingerprint() if checkpoint is not None else ""
        if checkpoint is not None and checkpoint.exists():
            state.read(checkpoint, fingerprint)
            self._kept = state.step
        if self._runtime.world > 1:
            state.share(self._runtime.device)
        if self._learner is not None:
            self._learner.resume(state.updates)
        progress.start(f"training {self._contender}, seed {self._seed}", steps)
        progress.advance(state.step)
        written = time.monotonic()
        while state.step < steps:
            self._step(checkpoint)
            state.step += 1
            over = state.step % self._schedule.batches == 0
            due = checkpoint is not None and time.monotonic() - written >= _EVERY
            if over or due or state.step % _LOOK == 0:
                self._refuse_infinite(checkpoint)
            if over:
                self._close_epoch(checkpoint)
                progress.note(_told(state.rows[-1]))
            if checkpoint is not None and due:
                state.write(checkpoint, fingerprint)
                self._kept, written = state.step, time.monotonic()
            progress.advance()
        if "best" in state.tensors:
            self._weights.copy_(state.tensors["best"])
            self._statistics.copy_(state.tensors["best.statistics"])
            if self._learner is not None:
                self._learner.vector.copy_(state.tensors["best.policy"])

    def network(self) -> dict[str, Tensor]:
        """The tensors of the network, on the CPU."""
        return {name: value.cpu().clone() for name, value in self._network.state_dict().items()}

    def policy(self) -> dict[str, Tensor] | None:
        """The tensors of the policy that was learned, on the CPU."""
        if self._learner is None:
            return None
        return {name: value.cpu().clone() for name, value in self._learner.policy.state_dict().items()}

    def predictions(self) -> NDArray[np.int64]:
        """The class of each test image by the network, (tests,)."""
        return self._feed.judge(self._network, self.parts.test)[0]

    def history(self) -> NDArray[np.float32]:
        """(epochs, classes, operations, 6), as `HISTORY`; empty without a policy."""
        found: NDArray[np.float32] = self.state.tensors["history"].cpu().numpy()
        return found

    def strips(self) -> dict[str, NDArray[np.uint8]]:
        """What `record.strips` has made, by `record.MOMENTS`; empty without a policy."""
        if self._choice is None or self._choice.outlook is None:
            return {}
        return dict(zip(record.MOMENTS, self.state.tensors["strips"].cpu().numpy(), strict=True))

    def shown(self) -> list[int]:
        """Classes of the images in `strips`."""
        if not self.strips():
            return []
        count = self.state.tensors["strips"].shape[1]
        return [int(label) for label in self._prepared.labels[self._watched[:count]]]

    # --- a step ------------------------------------------------------------------------------------------------------

    def _step(self, checkpoint: Path | None) -> None:
        """The next step, and before it the policy's where one is due."""
        state, step = self.state, self.state.step
        batch = self._places[self._schedule.batch(step)]
        lr = self._schedule.rate(step)
        seen = state.tensors["seen"][step % self._schedule.batches].zero_()
        if self._learner is not None and step % self._recipe.policy_every == 0:
            self._refuse_infinite(checkpoint)
            if self._schedule.moves_policy(step):
                seen[_POLICY] = self._move_policy(self._learner, batch, lr, checkpoint)
            self._learner.look(self._weights, self._statistics)
        own = _share_of(len(batch), self._runtime.rank, self._runtime.world)
        images, augmented = self._augmented(self._feed.standard(step, batch, own), len(batch), own)
        x = self._feed.input(step, images, len(batch), own)
        gradient, loss, right = self._gradient(x, self._feed.labels(batch[own]), len(batch))
        norm = gradient.norm()
        gradient.mul_((self._recipe.clip / (norm + 1e-6)).clamp(max=1))
        self._momentum.mul_(MOMENTUM).add_(gradient).add_(self._weights, alpha=self._recipe.weight_decay)
        self._weights.add_(self._momentum, alpha=-lr)
        seen[:_AUGMENTED] = torch.stack([loss, right, norm])
        seen[_AUGMENTED] = augmented

    def _augmented(self, images: Tensor, whole: int, own: slice) -> tuple[Tensor, int]:
        """The images `own` of a batch of `whole`, some of them augmented; and how many of the batch are."""
        choice = self._choice
        if choice is None:
            return images, 0
        epoch = self.state.step // self._schedule.batches
        share = probability(epoch, self._recipe.tau, self._recipe.curriculum_floor)
        coin = coins(self._feed.random(f"coin/{self.state.step}"), share, whole)
        picked, mine = int(coin.sum()), np.flatnonzero(coin[own])
        if not len(mine):
            return images, picked
        before = int(coin[: own.start].sum())
        rows = slice(before, before + len(mine))
        places = torch.from_numpy(mine).to(images.device)
        taken = images[places]
        outlook = self._outlook(choice, taken, picked, rows)
        drawn = choice.drawn(outlook, picked, self._randoms())
        changed = self._backend.augmented(taken, choice.operations, part_of(drawn, rows))
        return images.index_copy(0, places, changed), picked

    def _outlook(self, choice: Choice, images: Tensor, whole: int, rows: slice) -> tuple[Tensor, Tensor] | None:
        """Logits and magnitudes for all `whole` images of a batch that are augmented; 0 for those that other processes
        have. Random numbers are drawn for all of them, so that each image has its own."""
        if choice.outlook is None:
            return None
        own = choice.outlook(images)
        if len(images) == whole:
            return own
        both = torch.zeros(2, whole, len(choice.operations), device=images.device)
        both[:, rows] = torch.stack(own)
        return both[0], both[1]

    def _gradient(self, x: Tensor, labels: Tensor, whole: int) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient, (P,), of the mean loss over a batch of `whole` images, its summed loss, and how many it has
        right; `x` are those of this process."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._narrow):
            logits = self._network(x)
        logits = logits.float()
        loss = cross_entropy(logits, labels, label_smoothing=self._recipe.label_smoothing, reduction="sum")
        gradients = torch.autograd.grad(loss, self._parameters)
        right = (logits.detach().argmax(-1) == labels).sum()
        if self._runtime.world == 1:
            gradient = torch.cat([each.flatten() for each in gradients])
            return gradient.div_(whole), loss.detach(), right.float()
        total = torch.cat([*(each.flatten() for each in gradients), loss.detach()[None], right[None].float()])
        torch.distributed.all_reduce(total)
        return total[:-2].div_(whole), total[-2], total[-1]

    def _move_policy(self, learner: Learner, batch: NDArray[np.int64], lr: float, checkpoint: Path | None) -> float:
        """A step of the policy; the norm of its gradient."""
        inner = slice(0, min(self._recipe.inner_batch, len(batch)))
        val = self.parts.val
        outer = self._feed.random(f"validation/{self.state.step}").choice(
            val, min(self._recipe.val_batch, len(val)), replace=False
        )
        norm = learner.step(
            self._network,
            self._momentum,
            (self._feed.standard(self.state.step, batch, inner), self._feed.labels(batch[inner])),
            (self._feed.pixels(outer), self._feed.labels(outer)),
            lr=lr,
            backend=self._backend,
            randoms=self._randoms("policy/"),
        )
        if not np.isfinite(norm):
            raise self._broken_off("gradient of the policy", self.state.step, checkpoint)
        self.state.updates += 1
        return norm

    # --- an epoch ----------------------------------------------------------------------------------------------------

    def _close_epoch(self, checkpoint: Path | None) -> None:
        """Note what the epoch has come to."""
        state, batches = self.state, self._schedule.batches
        epoch = state.step // batches - 1
        totals = state.tensors["seen"].double().sum(0).tolist()
        moved = state.updates - (state.rows[-1]["policy_updates"] if state.rows else 0)
        images = min(len(self._places), batches * self._recipe.train_batch)
        row: dict[str, Any] = {
            "epoch": epoch,
            "lr": self._schedule.rate(state.step - 1),
            "curriculum": probability(epoch, self._recipe.tau, self._recipe.curriculum_floor) if self._choice else 0.0,
            "augmented": totals[_AUGMENTED] / images,
            "train_loss": totals[_LOSS] / images,
            "train_accuracy": totals[_RIGHT] / images,
            **self._validation(),
            "policy_updates": state.updates,
            "hypergradient_norm": totals[_POLICY] / moved if moved else None,
            "entropy": None,
            "strength": None,
        }
        if self._choice is not None and self._choice.outlook is not None:
            row |= self._watch(self._choice, epoch)
        for name, value in row.items():
            if value is not None and not math.isfinite(value):
                raise self._broken_off(name.replace("_", " "), state.step - 1, checkpoint)
        state.rows.append(row)
        if "best" in state.tensors and record.best_epoch(state.rows) == epoch:
            state.tensors["best"].copy_(self._weights)
            state.tensors["best.statistics"].copy_(self._statistics)
            if self._learner is not None:
                state.tensors["best.policy"].copy_(self._learner.vector)

    def _validation(self) -> dict[str, float | None]:
        """Loss and accuracy on the images of the policy; None where they are learned from as well."""
        if self._contender == "train+val":
            return {"val_loss": None, "val_accuracy": None}
        predicted, losses = self._feed.judge(self._network, self.parts.val)
        right = predicted == self._prepared.labels[self.parts.val]
        return {"val_loss": float(losses.mean()), "val_accuracy": float(right.mean())}

    def _watch(self, choice: Choice, epoch: int) -> dict[str, float]:
        """Keep how the policy is at the end of an epoch, by the network at the end of it."""
        tensors = self.state.tensors
        if self._learner is not None:
            choice = replace(choice, outlook=partial(self._learner.outlook_by, self._network))
        images, labels = self._feed.pixels(self._watched), self._prepared.labels[self._watched]
        figures, entropy, strength = record.watched(
            choice, images, labels, len(self._prepared.names), self._feed.judged
        )
        tensors["history"][epoch] = torch.from_numpy(figures)
        for place, (moment, at) in enumerate(record.moments(self._recipe.epochs).items()):
            if at == epoch:
                randoms = self._randoms(f"strips/{moment}/")
                tensors["strips"][place] = record.strips(choice, images, self._backend, randoms)
        return {"entropy": entropy, "strength": strength}

    # --- what is needed for it ---------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        """All numbers that change, by name."""
        weights, device = self._weights, self._runtime.device
        found = {"weights": weights, "statistics": self._statistics, "momentum": self._momentum}
        found["seen"] = torch.zeros(self._schedule.batches, 5, device=device)
        if self._learner is not None:
            found |= self._learner.tensors()
        watched = self._choice is not None and self._choice.outlook is not None
        classes, operations = len(self._prepared.names), len(self._choice.operations) if self._choice else 0
        shape = (self._recipe.epochs, classes, operations, len(HISTORY)) if watched else (0, 0, 0, 0)
        found["history"] = torch.zeros(shape)
        if watched:
            strip = record.strip_shape((len(self._watched), *self._prepared.images.shape[1:]))
            found["strips"] = torch.zeros(len(record.MOMENTS), *strip, dtype=torch.uint8)
        if self._recipe.select == "validation" and self._contender != "train+val":
            found |= {"best": weights.clone(), "best.statistics": self._statistics.clone()}
            if self._learner is not None:
                found["best.policy"] = self._learner.vector.clone()
        return found

    def _randoms(self, of: str = "") -> dict[str, Generator]:
        """What chains are drawn from in the next step, for the purpose `of`."""
        return {name: self._feed.random(f"{of}{name}/{self.state.step}") for name in STREAMS}

    def _refuse_infinite(self, checkpoint: Path | None) -> None:
        """Raise the first step of the epoch whose loss or gradient was not finite, or where the network overflowed."""
        seen, batches = self.state.tensors["seen"], self._schedule.batches
        if bool(seen.isfinite().all()):
            if bool(self._statistics.isfinite().all()):
                return
            raise self._broken_off("network", self.state.step - 1, checkpoint)
        loss, norm = seen[:, (_LOSS, _NORM)].isfinite().logical_not().double().cpu().numpy().T
        first = int(np.argmax(loss + norm > 0))
        begun = (self.state.step - 1) // batches * batches
        raise self._broken_off("loss" if loss[first] else "gradient", begun + first, checkpoint)

    def _broken_off(self, what: str, step: int, checkpoint: Path | None) -> CheckFailed:
        kept = f"{checkpoint} keeps the state after step {self._kept:,}" if self._kept else "nothing is kept"
        return CheckFailed(
            f"{self._contender}, seed {self._seed}: the {what} was not finite at step {step + 1:,}; {kept}",
            hint=f"a smaller --lr than {self._recipe.lr:g} may help",
        )

    def _fingerprint(self) -> str:
        """What tells this training from others: images, options, seed, number format, a policy that is given."""
        decisive = [
            *(self._contender, self._seed, asdict(self._recipe), self._prepared.digest, str(self._runtime.dtype)),
            self._given.sources if self._given is not None else [],
        ]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _share_of(images: int, rank: int, world: int) -> slice:
    """The part of a batch that a process computes."""
    return slice(rank * images // world, (rank + 1) * images // world)


def _told(row: Mapping[str, Any]) -> str:
    """An epoch in a line."""
    val = f", {row['val_accuracy']:.3f} in validation" if row["val_accuracy"] is not None else ""
    return f"epoch {row['epoch'] + 1}: loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.3f}{val}"
