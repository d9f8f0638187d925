"""What the rows of the study say: of groups that converged a ranking, of the others that they did not.

A group is all models of one task and one number of pairs. Softmax can solve each of these tasks, so it is the
yardstick: a group has converged when most of its exp models reached the line. Where they did not, the steps were too
few or the vocabulary too large to learn the task at all, a low accuracy says nothing of a kernel, and nothing is
ranked. Where they did, the others had the same steps, batches and initial parameters, and what they ended with is a
result at that budget, even below the line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pomona.methods.attn_compare.recall.models import cache_bytes
from pomona.methods.attn_compare.recall.training import HELD_OUT, INTERVAL, RECALLED, STOP
from pomona.methods.attn_compare.rows import Row
from pomona.report.sections import Section, Table

YARDSTICK = "exp"

FIGURE = "recall_accuracy"


@dataclass(frozen=True)
class Runs:
    """The models of one kernel in a group.

    Attributes:
        values: of each that did not fail.
        failures: why the others did.
    """

    kernel: str
    values: Sequence[Mapping[str, Any]]
    failures: Sequence[str]

    @property
    def accuracies(self) -> list[float]:
        return [each["accuracy"] for each in self.values]

    @property
    def accuracy(self) -> float | None:
        """The mean; None where one failed, for a mean over the rest would flatter."""
        return fmean(self.accuracies) if self.values and not self.failures else None

    @property
    def recalled(self) -> list[int]:
        """Steps at which those that reached the line were first seen there."""
        return [each["steps_to_99"] for each in self.values if each["steps_to_99"] is not None]

    @property
    def count(self) -> int:
        return len(self.values) + len(self.failures)


@dataclass(frozen=True)
class Group:
    """All models of one task and one number of pairs.

    Attributes:
        point: what they have in common.
        runs: by kernel.
        among: what of `point`, besides task and pairs, is not the same in all groups of a report.
    """

    point: Mapping[str, Any]
    runs: Mapping[str, Runs]
    among: Sequence[str] = ()

    @property
    def name(self) -> str:
        return ":".join([self.task, str(self.pairs), *(f"{name}={self.point[name]}" for name in self.among)])

    @property
    def task(self) -> str:
        return str(self.point["task"])

    @property
    def pairs(self) -> int:
        return int(self.point["pairs"])

    @property
    def variant(self) -> str:
        """The task, with what else tells this group from others of as many pairs."""
        return ", ".join([self.task, *(f"{name.replace('_', ' ')} {self.point[name]}" for name in self.among)])

    @property
    def title(self) -> str:
        return f"{self.variant}, {self.pairs} pair{'s' * (self.pairs != 1)}"

    @property
    def converged(self) -> bool:
        """Whether most models with exp reached the line."""
        exp = self.runs.get(YARDSTICK)
        return exp is not None and 2 * len(exp.recalled) > exp.count

    def ranked(self) -> list[Runs]:
        """Kernels without a failure, the most accurate first."""
        whole = [runs for runs in self.runs.values() if runs.accuracy is not None]
        return sorted(whole, key=lambda runs: -(runs.accuracy or 0))


def groups(rows: Sequence[Row]) -> list[Group]:
    """The groups in the order of the plan; models of other sizes, budgets or seeds are in groups of their own."""
    found: dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, list[Row]]]] = {}
    for row in rows:
        if row["status"] == "skipped":
            continue
        shared = {name: value for name, value in row["point"].items() if name != "number"}
        _, kernels = found.setdefault(tuple(sorted(shared.items())), (shared, {}))
        kernels.setdefault(row["kernel"], []).append(row)
    points = [shared for shared, _ in found.values()]
    among = [
        name for name in ("vocabulary", "feature_dim", "steps", "seed") if len({each[name] for each in points}) > 1
    ]
    return [
        Group(shared, {kernel: _runs(kernel, each) for kernel, each in kernels.items()}, among)
        for shared, kernels in found.values()
    ]


def _runs(kernel: str, rows: Sequence[Row]) -> Runs:
    return Runs(
        kernel,
        [row["values"] for row in rows if row["status"] != "failed"],
        [str(row.get("reason")) for row in rows if row["status"] == "failed"],
    )


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """By kernel the mean accuracy in each group ``TASK:PAIRS``, and which groups converged.

    None stands for a group that did not converge, and for a kernel that failed.
    """
    found: dict[str, Any] = {}
    converged = {}
    for group in groups(rows):
        converged[group.name] = group.converged
        for runs in group.runs.values():
            mean = runs.accuracy if group.converged else None
            found.setdefault(runs.kernel, {})[group.name] = None if mean is None else round(mean, 4)
    return {**found, "converged": converged}


def section(rows: Sequence[Row]) -> Section:
    """Rankings of the groups that converged, with mean, least and greatest over seeds."""
    found = groups(rows)
    shown = [group for group in found if group.converged]
    return Section(
        title="recall",
        question="Does it remember what it was told?",
        verdict=[sentence for group in found for sentence in _verdict(group)] or ["Nothing was measured."],
        notes=_notes(found),
        tables=[_table(found)] if found else [],
        figures=[(FIGURE, _CAPTION)] if shown else [],
    )


def _verdict(group: Group) -> Iterator[str]:
    steps = group.point["steps"]
    if not group.converged:
        exp = group.runs.get(YARDSTICK)
        why = f"{len(exp.recalled)} of {exp.count} exp models" if exp else "no exp model, as none ended,"
        yield (
            f"{group.title}: not converged. {why[0].upper()}{why[1:]} reached {RECALLED} within {steps:,} steps, "
            "so nothing is said of the others; more --steps or a smaller --vocabulary may help."
        )
        return
    ranked = group.ranked()
    above = [runs for runs in ranked if len(runs.recalled) == runs.count]
    below = [runs for runs in ranked if len(runs.recalled) < runs.count]
    text = f"{group.title}: "
    if above:
        text += f"{_listed([runs.kernel for runs in above])} recall{'s' * (len(above) == 1)} it, {RECALLED} or more"
        text += " with every seed" + ("; " if below else "")
    if below:
        text += f"at {steps:,} steps " + ", ".join(f"{runs.kernel} gets {_spread(runs)}" for runs in below)
    yield f"{text}."
    for runs in group.runs.values():
        if runs.failures:
            yield (
                f"{group.title}: {runs.kernel} failed with {len(runs.failures)} of {runs.count} seeds "
                f"({runs.failures[0]}) and is not ranked."
            )


def _notes(found: Sequence[Group]) -> list[str]:
    widths, sizes = (
        " or ".join(map(str, sorted({group.point[name] for group in found}))) for name in ("feature_dim", "vocabulary")
    )
    return [
        "Matched: the models of a task, a number of pairs and a seed differ in nothing but the kernel. They begin with "
        "the same parameters, see the same batches, have queries and keys "
        f"{widths} wide and a vocabulary of {sizes}. Their states are not matched: they have the sizes in the table. "
        "hedgehog and t2r alone have parameters besides, those of their maps.",
        f"Accuracy is over the answers of {HELD_OUT:,} sequences that are not trained on, looked at every {INTERVAL} "
        f"steps; above {STOP} training stops. In brackets stand the least and the greatest over seeds: kernels whose "
        "ranges overlap are not told apart. A model that knows which values it saw, but not whose, gets 1 / pairs of "
        "mqar.",
        f"A group has converged when most exp models reached {RECALLED}: softmax can solve every one of these tasks, "
        "so where it did not, the budget was at fault. Whatever others ended with in a converged group is measured at "
        "that many steps; more steps or other settings may raise it.",
        "One recipe is no bound. In 24 others that we tried (embeddings of standard deviation 0.05 to 0.3, with and "
        "without residuals and layer norms; mqar, 8 pairs, one seed) exp always recalled, and elu1 ended anywhere "
        "between 0.12 and 0.996.",
    ]


def _table(found: Sequence[Group]) -> Table:
    rows = []
    for group in found:
        for runs in group.ranked() if group.converged else group.runs.values():
            rows.append(_cells(group, runs))
        if group.converged:
            rows += [_cells(group, runs) for runs in group.runs.values() if runs.failures]
    return Table(
        f"Accuracy at the end: mean [least, greatest] over seeds. Steps until it was first seen at {RECALLED} or more, "
        "the fewest and the most; how many seeds were. State: bytes to keep for the next token in float32, of exp the "
        "keys and values of a whole sequence; beside the others' stands the length at which exp keeps as much. Groups "
        "that did not converge have no accuracies here.",
        [
            *("task", "pairs", "kernel", "accuracy", f"steps to {RECALLED}", "seeds there"),
            *("features", "state, bytes", "exp keeps as much at, tokens"),
        ],
        rows,
    )


def _cells(group: Group, runs: Runs) -> list[str]:
    at = [group.variant, str(group.pairs), runs.kernel]
    state = _state(runs, group.point["feature_dim"])
    if not group.converged:
        return [*at, "not converged", "–", "–", *state]
    steps = sorted({min(runs.recalled), max(runs.recalled)}) if runs.recalled else []
    return [
        *at,
        "failed" if runs.accuracy is None else _spread(runs),
        " to ".join(f"{each:,}" for each in steps) or "–",
        f"{len(runs.recalled)} of {runs.count}",
        *state,
    ]


def _state(runs: Runs, feature_dim: int) -> list[str]:
    if not runs.values:
        return ["–"] * 3
    features, size = (runs.values[0][name] for name in ("features", "state_bytes"))
    if features is None:
        return ["no finite map", f"{size:,}", "–"]
    return [f"{features:,}", f"{size:,}", f"{-(-size // cache_bytes(feature_dim)):,}"]


def _spread(runs: Runs) -> str:
    accuracies = runs.accuracies
    mean = f"{fmean(accuracies):.3f}"
    return mean if len(accuracies) == 1 else f"{mean} [{min(accuracies):.3f}, {max(accuracies):.3f}]"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


# --- the figure ------------------------------------------------------------------------------------------------------

_CAPTION = (
    "Accuracy over the number of pairs, with the least and the greatest over seeds; and, for the most pairs, over the "
    "bytes of state that decoding keeps. Groups that did not converge are left out."
)


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Two panels for each task with a converged group: accuracy over pairs, and over bytes of state."""
    from pomona.report.charts import Panel, Series, curves

    shown = [group for group in groups(rows) if group.converged]
    panels = []
    for variant in dict.fromkeys(group.variant for group in shown):
        found = sorted((group for group in shown if group.variant == variant), key=lambda group: group.pairs)
        kernels = dict.fromkeys(kernel for group in found for kernel in group.runs)
        whole = {kernel: _whole(found, kernel) for kernel in kernels}
        last = {kernel: _whole(found[-1:], kernel) for kernel in kernels}

        def series(kernel: str, x: Sequence[float], runs: Sequence[Runs]) -> Series:
            each = [run.accuracies for run in runs]
            return Series(kernel, x, [fmean(a) for a in each], [min(a) for a in each], [max(a) for a in each])

        lines = [series(kernel, [p for p, _ in each], [r for _, r in each]) for kernel, each in whole.items() if each]
        states = [
            series(kernel, [runs.values[0]["state_bytes"]], [runs]) for kernel, each in last.items() for _, runs in each
        ]
        panels += [
            Panel(variant, "pairs", "accuracy", lines, log_x=True, y_range=(0, 1.02)),
            Panel(found[-1].title, "bytes of state", "accuracy", states, log_x=True, y_range=(0, 1.02)),
        ]
    if panels:
        curves(folder / FIGURE, "Recall", panels, columns=2)


def _whole(found: Sequence[Group], kernel: str) -> list[tuple[int, Runs]]:
    """Pairs and models of `kernel`, without groups where one failed."""
    runs = [(group.pairs, group.runs[kernel]) for group in found if kernel in group.runs]
    return [(pairs, each) for pairs, each in runs if each.accuracy is not None]
