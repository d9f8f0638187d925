"""Training of a model with experts, merged or mixed, on texts; the same course however many processes share it.

A step's batch is cut into shards of `SHARD` texts. Each shard has a random stream of its own (dropout, the noise of the
gates, hidden tokens) and belongs to one process; losses, what the gates selected, and gradients are summed over all. So
one process and several take the same steps, up to the order of floating-point sums, and so do a merge of experts and a
mixture of them, which see the same data and the same noise.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter, functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from pomona.errors import CheckFailed, DataError, UsageError
from pomona.io.labelled import Labelled
from pomona.methods.meo_convert.config import TrainingOptions
from pomona.methods.meo_convert.data import IGNORED, Batch, Collator, Examples, Objective, encode, objective, order
from pomona.methods.meo_convert.modeling_meo import NoisyTopK, imbalance
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Progress
from pomona.runtime.seeds import derive

BATCH = 16
"""Texts of a step, as in the released GLUE script."""
SHARD = 8
"""Texts that one process sees at a time."""
_DECAY = 0.1  # of weights, not of biases and norms, as in the released GLUE script
_CLIP = 1.0
_SNAPSHOTS = 10


@dataclass(frozen=True)
class Scores:
    """How well a model predicts texts it was not trained on, without noise and without dropout.

    Attributes:
        accuracy: share of the classes or tokens that have the largest logit.
        nll: mean negative log-likelihood in nats.
        perplexity: its exponential, of language models; None too where it would overflow.
        predicted: classes or tokens.
    """

    accuracy: float
    nll: float
    perplexity: float | None
    predicted: int


@dataclass(frozen=True)
class TrainingResult:
    """What training did.

    Attributes:
        names: the classes, in the order of the logits; empty for language modelling.
        losses: of each step, the mean negative log-likelihood in nats, without the load-balancing loss.
        balances: of each step, the load-balancing loss before its weight; empty where there is none.
        parameters: numbers that were trained.
        texts, tested: texts to train on, and texts to measure with.
        truncated: texts of either that were longer than the limit.
    """

    objective: Objective
    names: tuple[str, ...]
    before: Scores
    after: Scores
    losses: tuple[float, ...]
    balances: tuple[float, ...]
    parameters: int
    texts: int
    tested: int
    truncated: int


def train(
    model: Any,
    tokenizer: Any,
    labelled: Labelled,
    test: Labelled,
    config: TrainingOptions,
    runtime: Runtime,
    progress: Progress,
    *,
    seed: int,
    batch_size: int = BATCH,
) -> TrainingResult:
    """Train all of `model`, in float32 and in place, on `labelled`; measure before and after on `test`.

    AdamW with weight decay 0.1, a learning rate that falls linearly to nothing, gradients clipped to norm 1. The
    load-balancing loss counts in training alone. Where the number format of `runtime` is bfloat16, matrix products are
    in it. With several processes each calls this with the same arguments, and each ends with the same model.

    Raises:
        CheckFailed: a loss, a gradient or a weight was not finite. The model then holds the last weights it kept whose
            loss was finite.
        DataError: a text or the tokenizer does not suit; the labels of `test` are others; there is one label alone.
        UsageError: the model cannot learn this.
    """
    if runtime.dtype is torch.float16:
        raise UsageError("training in float16 would lose small gradients", hint="use --dtype bfloat16 or float32")
    kind = objective(model, labelled)
    if kind == "classification":
        _check_labels(model, labelled, test)
    limit = longest(model.config, tokenizer, config.max_length)
    seen, held = (encode(part, tokenizer, kind, limit) for part in (labelled, test))
    if kind == "classification" and model.config.is_encoder_decoder:
        _check_ends(model.config, seen, held)
    collator = Collator.of(kind, tokenizer, runtime.device)
    model.to(runtime.device, torch.float32).requires_grad_(True)
    course = _Course(model, seen, collator, config, runtime, seed, batch_size)
    with _without_cache(model), torch.random.fork_rng(_forked(runtime.device)):
        before = evaluate(model, held, collator, runtime, seed=seed)
        course.run(progress)
        try:
            after = evaluate(model, held, collator, runtime, seed=seed)
        except CheckFailed as error:
            raise course.broken_off(f"after {config.steps} steps {error.message}") from None
    return TrainingResult(
        kind,
        seen.names,
        before,
        after,
        tuple(course.losses),
        tuple(course.balances),
        sum(parameter.numel() for parameter in course.parameters),
        len(seen),
        len(held),
        seen.truncated + held.truncated,
    )


@torch.no_grad()
def evaluate(
    model: Any, examples: Examples, collator: Collator, runtime: Runtime, *, seed: int, batch_size: int = 2 * BATCH
) -> Scores:
    """Accuracy and mean negative log-likelihood over `examples`, in batches of texts of like length.

    Raises:
        CheckFailed: a loss is not finite.
    """
    model.eval()
    places = sorted(range(len(examples)), key=lambda place: (examples.length(place), place))
    batches = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    found = []
    for number, chosen in enumerate(batches[runtime.rank :: runtime.world]):
        seeds = [derive(seed, f"measured/{place}") for place in chosen]
        batch = collator.batch(examples, chosen, seeds)
        logits, labels = predictions(model, batch, collator.kind, runtime)
        nll = float(functional.cross_entropy(logits, labels, reduction="sum").double())
        right = int((logits.argmax(-1) == labels).sum())
        found.append((number * runtime.world + runtime.rank, nll, right, len(labels)))
    found = sorted(_gathered(found, runtime))
    total = sum(count for *_, count in found)
    nll = math.fsum(entry[1] for entry in found) / total
    if not math.isfinite(nll):
        raise CheckFailed("the loss on the texts to measure with was not finite")
    perplexity = math.exp(nll) if collator.kind != "classification" and nll < 700 else None
    return Scores(sum(entry[2] for entry in found) / total, nll, perplexity, total)


def predictions(model: Any, batch: Batch, kind: Objective, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Logits (t, c) in float32 and labels (t,) of what is to be predicted in `batch`."""
    with torch.autocast(runtime.device.type, torch.bfloat16, enabled=runtime.dtype is torch.bfloat16):
        logits = model(**batch.inputs).logits
    labels = batch.labels
    if kind == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    asked = labels != IGNORED
    return logits[asked].float(), labels[asked]


def longest(config: Any, tokenizer: Any, wanted: int) -> int:
    """`wanted` tokens, or fewer where the model has fewer positions."""
    positions = getattr(config, "max_position_embeddings", None) or wanted
    if config.model_type in ("roberta", "xlm-roberta"):
        positions -= config.pad_token_id + 1  # its positions are counted from behind that of padding
    return min(wanted, int(positions), int(tokenizer.model_max_length))


class _Course:
    """The steps of one training."""

    def __init__(
        self,
        model: Any,
        examples: Examples,
        collator: Collator,
        config: TrainingOptions,
        runtime: Runtime,
        seed: int,
        batch_size: int,
    ) -> None:
        self._model, self._examples, self._collator = model, examples, collator
        self._config, self._runtime, self._seed = config, runtime, seed
        self._gates = gates(model) if config.balance else []
        self._batch_size = batch_size
        self._places = order(len(examples), seed, config.steps * batch_size)
        self.parameters: list[Parameter] = list(model.parameters())
        self._optimiser = AdamW(_grouped(model), lr=config.learning_rate, fused=True)
        self._schedule = LambdaLR(self._optimiser, lambda step: 1 - step / config.steps)
        self._kept: tuple[int, list[Tensor]] = (0, [])
        self.losses: list[float] = []
        self.balances: list[float] = []

    def run(self, progress: Progress) -> None:
        progress.start("training", self._config.steps)
        every = max(1, self._config.steps // _SNAPSHOTS)
        for step in range(self._config.steps):
            self._model.train()
            loss, balance = self._losses(step)
            if not (math.isfinite(loss) and math.isfinite(balance)):
                raise self.broken_off(f"the loss was not finite at step {step + 1}")
            if step % every == 0:
                self._keep(step)
            self._share_gradients()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, _CLIP)
            if not norm.isfinite():
                raise self.broken_off(f"the gradient was not finite at step {step + 1}")
            self._optimiser.step()
            self._schedule.step()
            self.losses.append(loss)
            if self._gates:
                self.balances.append(balance)
            progress.advance()
        if not all(parameter.isfinite().all() for parameter in self.parameters):
            raise self.broken_off(f"a weight was not finite after {self._config.steps} steps")

    def _keep(self, step: int) -> None:
        """Remember the weights as they are at `step`, in the place of those remembered before."""
        held = self._kept[1] or [torch.empty_like(parameter) for parameter in self.parameters]
        with torch.no_grad():
            for kept, parameter in zip(held, self.parameters, strict=True):
                kept.copy_(parameter)
        self._kept = step, held

    def broken_off(self, reason: str) -> CheckFailed:
        """Put the weights kept last back into the model; returns the error to raise."""
        step, weights = self._kept
        with torch.no_grad():
            for parameter, kept in zip(self.parameters, weights, strict=False):
                parameter.copy_(kept)
        return CheckFailed(
            f"{reason}; the last weights kept are those of step {step}",
            hint=f"a smaller --learning-rate than {self._config.learning_rate:g} may help",
        )

    def _losses(self, step: int) -> tuple[float, float]:
        """Mean negative log-likelihood and load-balancing loss of a step; leaves this process's share of gradients."""
        self._optimiser.zero_grad()
        device = self._runtime.device
        nll, predicted = torch.zeros((), device=device), 0
        tallies = [torch.zeros(2, len(gate.weight), device=device) for gate in self._gates]
        start = step * self._batch_size
        places = self._places[start : start + self._batch_size]
        shards = [places[first : first + SHARD] for first in range(0, len(places), SHARD)]
        for number in range(self._runtime.rank, len(shards), self._runtime.world):
            name = f"step/{step}/{number}"
            torch.manual_seed(derive(self._seed, name))
            seeds = [derive(self._seed, f"{name}/{place}") for place in range(len(shards[number]))]
            batch = self._collator.batch(self._examples, shards[number], seeds)
            logits, labels = predictions(self._model, batch, self._collator.kind, self._runtime)
            nll = nll + functional.cross_entropy(logits, labels, reduction="sum")
            predicted += len(labels)
            for place, gate in enumerate(self._gates):
                assert gate.balance is not None
                tallies[place] = tallies[place] + gate.balance.float()
        own = torch.cat([torch.stack((nll, nll.new_tensor(predicted))), *(tally.flatten() for tally in tallies)])
        # What the other processes add is a constant here, whose gradient they have themselves.
        everyone = own + (self._sum(own.detach()) - own.detach())
        mean = nll / everyone[1].detach()
        balance = everyone.new_zeros(())
        place = 2
        for tally in tallies:
            summed = everyone[place : place + tally.numel()].view_as(tally)
            balance = balance + imbalance(summed)
            place += tally.numel()
        total = mean + self._config.balance * balance
        if total.requires_grad:
            torch.autograd.backward(total)
        return float((everyone[0] / everyone[1]).detach()), float(balance.detach())

    def _share_gradients(self) -> None:
        """Sum every gradient over the processes."""
        if self._runtime.world == 1:
            return
        device = self._runtime.device
        present = torch.tensor([float(p.grad is not None) for p in self.parameters], device=device)
        somewhere = [p for p, found in zip(self.parameters, self._sum(present).tolist(), strict=True) if found]
        flat = self._sum(
            torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in somewhere])
        )
        for parameter, gradient in zip(somewhere, torch.split(flat, [p.numel() for p in somewhere]), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def _sum(self, values: Tensor) -> Tensor:
        return values if self._runtime.world == 1 else self._runtime.accelerator.reduce(values, "sum")


def gates(model: Any) -> list[NoisyTopK]:
    """The gates of `model` whose load is to be balanced: none at the task level, where all texts share their gates."""
    if getattr(model.config, "meo", {}).get("level") == "task":
        return []
    return [module for module in model.modules() if isinstance(module, NoisyTopK)]


def _grouped(model: Module) -> list[dict[str, Any]]:
    """Parameters with weight decay, and those without: biases and the scales of norms."""
    decayed: list[Parameter] = []
    free: list[Parameter] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or name.endswith("bias")
        (free if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": _DECAY}, {"params": free, "weight_decay": 0.0}]


def _check_labels(model: Any, labelled: Labelled, test: Labelled) -> None:
    if len(labelled.names) < 2:
        raise DataError(f"every text has the label {labelled.names[0]}", hint="classification needs two or more")
    if list(test.names) != list(labelled.names):
        raise DataError("the texts to measure with have other labels than those to train on")
    if model.config.num_labels != len(labelled.names):
        raise DataError(
            f"the model tells {model.config.num_labels} classes apart, the texts have {len(labelled.names)}"
        )


def _check_ends(config: Any, *parts: Examples) -> None:
    """A classifier behind an encoder looks at the last end token of a text, and wants as many in each."""
    if config.eos_token_id is None:
        raise DataError(f"a classifier of {config.model_type} finds the end of a text by its end token; there is none")
    counts = [entry["input_ids"].count(config.eos_token_id) for part in parts for entry in part.inputs]
    odd = next((place for place, count in enumerate(counts) if not count or count != counts[0]), None)
    if odd is not None:
        raise DataError(
            f"text {odd + 1} has {counts[odd]} end tokens, by which a classifier of {config.model_type} finds its end",
            hint="its tokenizer should put one behind every text, and no text should hold another",
        )


def _gathered(found: Sequence[Any], runtime: Runtime) -> list[Any]:
    if runtime.world == 1:
        return list(found)
    from accelerate.utils import gather_object

    return list(gather_object(list(found)))


def _forked(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


@contextlib.contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """Keys and values are not kept inside the block, as nothing is generated."""
    before = getattr(model.config, "use_cache", None)
    if before is not None:
        model.config.use_cache = False
    try:
        yield
    finally:
        if before is not None:
            model.config.use_cache = before
