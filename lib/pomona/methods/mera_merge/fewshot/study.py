"""Every arm, tuned and tested once for each draw of shots; each such piece of work gives one row."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from pomona.errors import CheckFailed, DataError, MissingError, UsageError
from pomona.io.labelled import read_labelled
from pomona.methods.mera_merge.adapters import Adapter, Bottleneck
from pomona.methods.mera_merge.bottleneck import Place, check_fit, placement
from pomona.methods.mera_merge.config import FewShotOptions
from pomona.methods.mera_merge.fewshot import arms
from pomona.methods.mera_merge.fewshot.inputs import Inputs, Prefix, longest
from pomona.methods.mera_merge.fewshot.sampling import Draw, draw
from pomona.methods.mera_merge.fewshot.tuning import Diverged, test, tune
from pomona.runtime.jobs import one_thread
from pomona.runtime.progress import Progress
from pomona.runtime.seeds import derive

BATCH = 16
"""Examples in a step, unless --batch-size says otherwise."""

Row = dict[str, Any]


class Journal(Protocol):
    """Where finished rows are kept, so that an interrupted run goes on; `pomona.io.journal.Journal` is one."""

    def get(self, key: str) -> Row | None: ...

    def append(self, key: str, value: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Piece:
    """One arm on one draw of shots."""

    arm: str
    number: int

    @property
    def key(self) -> str:
        return f"few-shot/{self.arm}/{self.number}"


@dataclass(frozen=True)
class Examples:
    """What there is to tune and test on.

    Attributes:
        texts: of the file to tune on, then of the file to test on.
        labels: of the same, as places in `names`.
        draws: of each repetition; `rest` are the places to test on.
    """

    texts: list[tuple[str, ...]]
    labels: list[int]
    names: list[str]
    draws: list[Draw]


def examples(config: FewShotOptions, seed: int, limit: int | None = None) -> Examples:
    """Read the files of `config` and draw the shots.

    Args:
        limit: records to read of each file.

    Raises:
        DataError: a file is not what it should be, has too few examples of a label, or leaves none to test on.
        MissingError: a file cannot be read.
    """
    assert config.few_shot is not None, "the caller has looked"
    fields = [field.strip() for field in config.text_field.split(",")]
    given = read_labelled(config.few_shot, text_fields=fields, label_field=config.label_field, limit=limit)
    draws = [draw(given.labels, given.names, config.shots, seed, number) for number in range(config.seeds)]
    if config.test is None:
        if not draws[0].rest:
            raise DataError(
                f"{config.few_shot}: all {len(given.texts)} examples are shots, none is left to test on",
                hint="lower --shots, or give --test",
            )
        return Examples(given.texts, given.labels, given.names, draws)
    tests = read_labelled(
        config.test, text_fields=fields, label_field=config.label_field, limit=limit, names=given.names
    )
    places = list(range(len(given.texts), len(given.texts) + len(tests.texts)))
    draws = [Draw(one.shots, places) for one in draws]
    return Examples(given.texts + tests.texts, given.labels + tests.labels, given.names, draws)


class Study:
    """All that the pieces share: the examples, the base and what it computes before the first adapter.

    Args:
        model: the base, frozen, in evaluation mode, in float32.
        adapters: those that were merged.
        average: their plain average; None leaves out the arm of that name.

    Raises:
        DataError: the merged adapter does not fit the base, or is no bottleneck adapter.
        MissingError: there is no tokenizer.
        UsageError: --max-length is more than the base can read.
    """

    def __init__(
        self,
        config: FewShotOptions,
        data: Examples,
        model: Any,
        tokenizer: Any,
        adapters: Sequence[Adapter],
        merged: Adapter,
        average: Adapter | None,
        *,
        seed: int,
        batch_size: int | None = None,
    ) -> None:
        if tokenizer is None:
            raise MissingError("the base model has no tokenizer, so it cannot be tuned on texts")
        most = longest(model.config)
        if most is not None and config.max_length > most:
            raise UsageError(f"--max-length is {config.max_length}; the base model reads {most} tokens at most")
        check_fit(model, merged.label, merged.sites(), placement(merged))
        self.config, self.data, self.model, self.seed = config, data, model, seed
        self._batch = batch_size or BATCH
        self._sources = adapters
        self._adapters = {"merged": merged, **{f"single:{adapter.label}": adapter for adapter in adapters}}
        if average is not None:
            self._adapters["average"] = average
        self._inputs = Inputs(tokenizer, data.texts, max_length=config.max_length, device=model.device)
        self._prefix = Prefix(model, min(map(Place.of, merged.sites())), self._inputs)

    def pieces(self) -> list[Piece]:
        """In the order in which they are done: all arms on the first draw, then on the next."""
        found = arms.names(self._sources, self.config.baselines)
        if "average" not in self._adapters:
            found = [arm for arm in found if arm != "average"]
        return [Piece(arm, number) for number in range(self.config.seeds) for arm in found]

    def measure(self, piece: Piece) -> Row:
        """The row of `piece`: ``status`` is done, or failed where a loss was not finite, with the reason."""
        return self._tuned(piece)[0]

    def tuned(self, number: int = 0) -> Tuned:
        """The merged adapter as draw `number` tunes it, the very one that its row was measured on.

        Raises:
            CheckFailed: a loss was not finite.
        """
        with one_thread():
            row, tuned = self._tuned(Piece("merged", number))
        if tuned is None:
            raise CheckFailed(f"the merged adapter could not be tuned: {row['reason']}", hint="lower --learning-rate")
        return tuned

    def _tuned(self, piece: Piece) -> tuple[Row, Tuned | None]:
        drawn = self.data.draws[piece.number]
        row: Row = {"arm": piece.arm, "draw": piece.number, "status": "done"}
        with ExitStack() as stack:
            stack.enter_context(_drawing(derive(self.seed, f"few-shot/dropout/{piece.number}"), self.model.device))
            width, labels = self.model.config.hidden_size, len(self.data.names)
            head = arms.new_head(width, labels, self.seed, piece.number).to(self.model.device, self.model.dtype)
            building = arms.built(
                piece.arm,
                self.model,
                self._adapters,
                self._sources,
                head,
                inputs=self._inputs,
                prefix=self._prefix,
                pooling=self.config.pooling,
                rate=self.config.learning_rate,
                random=arms.generator(self.seed, f"{piece.arm}/{piece.number}"),
            )
            network, attached = stack.enter_context(building)
            row["trained_parameters"] = sum(parameter.numel() for parameter in network.parameters())
            row["added_parameters"] = 0 if attached is None else attached.parameters()
            order = np.random.Generator(np.random.Philox(derive(self.seed, f"few-shot/order/{piece.number}")))
            clock = time.perf_counter()
            try:
                loss = tune(
                    network,
                    drawn.shots,
                    self.data.labels,
                    epochs=self.config.epochs,
                    batch_size=self._batch,
                    random=order,
                )
                tuning = time.perf_counter() - clock
                accuracy, nll = test(network, self._inputs, drawn.rest, self.data.labels)
            except Diverged as error:
                row |= {"status": "failed", "reason": str(error), "accuracy": None, "nll": None, "loss": None}
                return row | {"timing": {}}, None
            row |= {"accuracy": accuracy, "nll": nll, "loss": loss, "tests": len(drawn.rest)}
            row["timing"] = {"tuning_seconds": tuning, "testing_seconds": time.perf_counter() - clock - tuning}
            return row, Tuned({} if attached is None else attached.sites(), head.requires_grad_(False).cpu())


@dataclass(frozen=True)
class Tuned:
    """What an arm has become.

    Attributes:
        sites: of the adapter; empty where none was tuned.
        head: (d to labels), of the labels in the order of `Examples.names`.
    """

    sites: dict[str, Bottleneck]
    head: nn.Linear


def run_few_shot(study: Study, journal: Journal, progress: Progress, measured: dict[str, Any]) -> list[Row]:
    """The rows of all pieces in their order; those that `journal` has are not measured again.

    On a CPU in one thread, so that rows do not depend on how many there are. Seconds are never the same twice: they
    leave the rows for `measured`, under the key of their piece.
    """
    pieces = study.pieces()
    progress.start("few-shot", len(pieces))
    rows = []
    with one_thread():
        for piece in pieces:
            row = journal.get(piece.key)
            if row is None:
                row = study.measure(piece)
                measured[piece.key] = row.pop("timing")
                journal.append(piece.key, row)
            rows.append(row)
            progress.advance()
    return rows


@contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Inside the block torch draws from `seed`, dropout above all; afterwards its stream is as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
