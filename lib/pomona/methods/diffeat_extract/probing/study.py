"""Accuracies of features and controls on the same draws and the same test images, and the choice among several."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.io.journal import Journal, NoJournal
from pomona.methods.diffeat_extract.config import ProbeOptions, shots
from pomona.methods.diffeat_extract.probing.contenders import Contender
from pomona.methods.diffeat_extract.probing.splits import Task, draws, validation
from pomona.report import outcomes
from pomona.runtime.progress import Progress
from pomona.runtime.seeds import derive


@dataclass(frozen=True)
class Study:
    """How contenders are compared.

    Attributes:
        journal: keeps each finished set of fits, for --resume.
    """

    config: ProbeOptions
    task: Task
    seed: int
    journal: Journal | NoJournal
    progress: Progress

    def counts(self) -> list[int | None]:
        """Labelled images of each class, fewest first; None is all of them."""
        return shots(self.config.shots)

    def fits(self, count: int | None) -> int:
        """Fits of one contender with `count` labelled images of each class."""
        return 1 if count is None else self.config.draws

    def correct(self, contender: Contender, count: int | None, task: Task | None = None) -> NDArray[np.bool_]:
        """Whether each test image is classified rightly, (draws, tests)."""
        on = task if task is not None else self.task
        part = "test" if task is None else "validation"
        key = f"{part}/{contender.kind}/{contender.column}/{_name(count)}"
        earlier = self.journal.get(key)
        if earlier is None:
            found = np.stack([self._fit(contender, on, rows) for rows in self._draws(on, count)])
            self.journal.append(key, _packed(found))
        else:
            found = _unpacked(earlier)
            self.progress.advance(len(found))
        return found

    def check(self, *, choosing: bool) -> None:
        """See to it, before there are features, that every label has the images that will be drawn.

        Args:
            choosing: whether one column of several is chosen, by half of the images to learn from.

        Raises:
            DataError: a label has fewer.
        """
        for count in self.counts():
            self._draws(self.task, count)
        if choosing:
            self._draws(validation(self.task, self.seed), self.choosing_count())

    def _draws(self, task: Task, count: int | None) -> list[NDArray[np.int64]]:
        whole = task.train.size == self.task.train.size
        among = "to learn from" if whole else "in the half of those to learn from that settings are chosen with"
        return draws(task, count, self.config.draws, self.seed, among)

    def _fit(self, contender: Contender, task: Task, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        predicted = contender.fit(task, rows, derive(self.seed, "probe"))
        self.progress.advance()
        right: NDArray[np.bool_] = predicted == task.labels[task.test]
        return right

    def table(self, contenders: Sequence[Contender]) -> list[dict[str, Any]]:
        """Accuracy of every contender with every number of labels; where there are features of the same column, theirs
        less its own, on the same draws and images."""
        rows = []
        for count in self.counts():
            found = {(each.kind, each.column): self.correct(each, count) for each in contenders}
            features = [key for key in found if key[0] == "features"]
            for (kind, column), correct in found.items():
                row = {
                    "kind": kind,
                    "column": column,
                    "shots": _name(count),
                    **asdict(outcomes.accuracy(correct, seed=self.seed)),
                }
                if kind != "features":
                    ours = [key for key in features if kind == "pixels" or key[1] == column]
                    row["behind"] = {
                        key[1]: asdict(outcomes.difference(found[key], correct, seed=self.seed)) for key in ours
                    }
                rows.append(row)
        return rows

    def choose(self, cells: Mapping[str, Mapping[str, Any]]) -> str:
        """The column with the highest accuracy in validation; the first of equals."""
        return max(cells, key=lambda column: cells[column]["mean"])

    def choosing_count(self) -> int | None:
        """The number of labels to choose by: the largest that is not all, as all of them leave little to tell apart."""
        counted = [count for count in self.counts() if count is not None]
        return max(counted) if counted else None


def of(rows: Sequence[Mapping[str, Any]], kind: str, column: str | None = None) -> Mapping[str, Any] | None:
    """The row of that kind, and column if given, with most labels."""
    found = [row for row in rows if row["kind"] == kind and column in (None, row["column"])]
    return found[-1] if found else None


def _name(count: int | None) -> str:
    return "all" if count is None else str(count)


def _packed(correct: NDArray[np.bool_]) -> dict[str, Any]:
    bits = base64.b64encode(np.packbits(correct).tobytes()).decode("ascii")
    return {"draws": correct.shape[0], "tests": correct.shape[1], "correct": bits}


def _unpacked(entry: Mapping[str, Any]) -> NDArray[np.bool_]:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(entry["correct"]), dtype=np.uint8))
    return bits[: entry["draws"] * entry["tests"]].reshape(entry["draws"], entry["tests"]).astype(bool)
