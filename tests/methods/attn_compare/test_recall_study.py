"""Points, rows and sections of recall: what is trained, what is said of it, and of what nothing is said."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pomona.errors import UsageError
from pomona.methods.attn_compare import kernels
from pomona.methods.attn_compare.config import Config
from pomona.methods.attn_compare.recall import study, training
from pomona.methods.attn_compare.recall.training import Outcome, train
from pomona.methods.attn_compare.rows import Point, Workshop
from pomona.report.sections import Section
from pomona.runtime.settings import Settings

Rows = list[dict[str, Any]]
SHOP = Workshop(Path(), "cpu")


def points(seed: int = 0, **options: Any) -> list[Point]:
    return study.plan(Config(**options), Settings(seed=seed))


def measured(planned: list[Point]) -> Rows:
    return [row for point in planned for row in study.measure(point, SHOP)]


def lasting(rows: Rows) -> str:
    return json.dumps([{name: value for name, value in row.items() if name != "timing"} for row in rows])


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def row(kernel: str, accuracy: float | None, number: int = 0, pairs: int = 8, **changed: Any) -> dict[str, Any]:
    """A row as `measure` makes them."""
    done = accuracy is not None and accuracy >= 0.99
    values = {"accuracy": accuracy, "steps_to_99": 500 if done else None, "steps": 500 if done else 2000, "loss": 0.1}
    state = {"features": None if kernel == "exp" else 16, "state_bytes": 320 * 4 * pairs if kernel == "exp" else 4160}
    point = {"task": "mqar", "pairs": pairs, "number": number, "vocabulary": 64, "feature_dim": 16, "steps": 2000}
    status = "failed" if accuracy is None else "done" if done else "not_converged"
    return {
        "study": "recall",
        "kernel": kernel,
        "point": {**point, "seed": 0, **changed},
        "status": status,
        **({} if done else {"reason": "the loss was not finite at step 7" if accuracy is None else "below"}),
        "values": {**values, **state},
    }


def cells(section: Section) -> list[list[str]]:
    return [list(each) for each in section.tables[0].rows]


# --- points ----------------------------------------------------------------------------------------------------------


def test_exp_is_always_measured_and_once() -> None:
    assert [point.settings["kernel"] for point in points(kernels="relu", pairs="4", seeds=1)] == ["exp", "relu"]
    assert [point.settings["kernel"] for point in points(kernels="relu,exp", pairs="4", seeds=1)] == ["exp", "relu"]


def test_the_plan_has_every_task_number_kernel_and_seed_under_a_name_of_its_own() -> None:
    planned = points(task="mqar,copy,mqar", pairs="8,4", kernels="relu", seeds=3, seed=0)
    assert len(planned) == len({point.name for point in planned}) == 2 * 2 * 2 * 3
    assert [point.settings["pairs"] for point in planned[:12]] == [4] * 6 + [8] * 6
    assert len(points()) == 3 * 8 * 3
    assert json.loads(json.dumps(planned[0].settings)) == planned[0].settings


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"task": "mqar,recite"}, "--task recite: expected mqar, induction, copy"),
        ({"task": " ,"}, "--task names no task"),
        ({"pairs": "4,x"}, "--pairs x: give whole numbers from 1 to 64"),
        ({"pairs": "0"}, "--pairs 0"),
        ({"pairs": "65", "vocabulary": 256}, "--pairs 65: give whole numbers from 1 to 64"),
        ({"pairs": "9" * 5000}, "--pairs 9"),
        ({"pairs": "٣"}, "--pairs ٣"),
        ({"pairs": ""}, "--pairs names no number"),
        ({"pairs": "4,33"}, "--vocabulary 64 is too small for 33 pairs"),
        ({"vocabulary": 63}, "--vocabulary is 63"),
        ({"vocabulary": -2}, "--vocabulary -2 is too small"),
        ({"vocabulary": 2, "pairs": "1"}, "--vocabulary is 2; give 4"),
        ({"feature_dim": 0}, "--feature-dim is 0; give 1 to 256"),
        ({"steps": 1}, "--steps is 1; give 2"),
        ({"seeds": 0}, "--seeds is 0; give 1"),
    ],
)
def test_what_no_model_or_task_can_be_made_of_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        Config(**options)
    assert told in caught.value.message


def test_the_refusal_names_a_vocabulary_that_will_do() -> None:
    with pytest.raises(UsageError) as caught:
        Config(pairs="40")
    assert caught.value.hint is not None and "--vocabulary 80" in caught.value.hint
    Config(pairs="40", vocabulary=80)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_point_has_the_same_row_each_time_and_in_any_process() -> None:
    planned = points(kernels="hedgehog,favor:16,t2r", pairs="3", seeds=1, steps=30)
    here = measured(planned)
    assert lasting(here) == lasting(measured(planned))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        there = list(pool.map(study.measure, planned[::-1], [SHOP] * len(planned)))
    assert lasting(here) == lasting([row for rows in there[::-1] for row in rows])
    other = measured(points(kernels="hedgehog,favor:16,t2r", pairs="3", seeds=1, steps=30, seed=1))
    assert all(a["values"]["loss"] != b["values"]["loss"] for a, b in zip(here, other, strict=True))


def test_softmax_recalls_four_pairs_and_the_row_says_when() -> None:
    (found,) = measured(points(kernels="exp", pairs="4", seeds=1))
    values = found["values"]
    assert found["status"] == "done" and "reason" not in found
    assert values["accuracy"] >= 0.995 and values["loss"] < 0.1
    assert values["steps_to_99"] <= values["steps"] <= 750 and values["steps"] % 250 == 0
    assert (values["features"], values["state_bytes"]) == (None, 16 * 80 * 4)
    assert set(found["timing"]) == {"seconds", "cpu_seconds"}


@pytest.mark.parametrize("task", ["induction", "copy"])
def test_softmax_learns_the_other_tasks(task: str) -> None:
    (found,) = measured(points(kernels="exp", task=task, pairs="4", seeds=1))
    assert found["status"] == "done" and found["values"]["accuracy"] >= 0.995


@pytest.mark.parametrize("steps", [2, 3, 7, 251])
def test_the_last_step_is_followed_by_a_look(steps: int) -> None:
    (found,) = measured(points(kernels="exp", pairs="8", seeds=1, steps=steps, vocabulary=1024))
    assert found["values"]["steps"] == steps and 0 <= found["values"]["accuracy"] <= 1
    assert found["status"] == "not_converged"
    assert found["reason"] == f"accuracy below 0.99 at {steps} steps"


def test_before_training_the_loss_is_that_of_guessing() -> None:
    """ln V in nats, and 1 / V right: nothing is known in a step of 1 / 25 of the rate."""
    (found,) = measured(points(kernels="exp", pairs="8", seeds=1, steps=2, vocabulary=512))
    assert found["values"]["loss"] == pytest.approx(6.238, abs=0.4)  # ln 512
    assert found["values"]["accuracy"] < 0.02


def test_a_loss_that_is_not_finite_is_a_failed_row_with_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose seventh weights are infinite."""
    calls = itertools.count(1)
    broken = dataclasses.replace(
        kernels.find("exp"), weight=lambda scores: scores.exp() * (math.inf if next(calls) == 7 else 1)
    )
    (point,) = points(kernels="exp", pairs="4", seeds=1)
    monkeypatch.setattr(kernels, "find", lambda name: broken)
    (found,) = measured([point])
    assert found["status"] == "failed" and found["values"]["accuracy"] is found["values"]["loss"] is None
    assert found["reason"] == "the loss was not finite at step 7" and found["values"]["steps"] == 7
    json.dumps(found, allow_nan=False)


def test_a_held_out_loss_that_is_not_finite_is_a_failed_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "judge", lambda model, held_out: (0.999, math.nan))
    (found,) = measured(points(kernels="exp", pairs="4", seeds=1, steps=3))
    assert found["status"] == "failed" and found["values"]["accuracy"] is found["values"]["loss"] is None
    assert found["reason"] == "the held-out loss was not finite after 3 steps"


# --- sections --------------------------------------------------------------------------------------------------------


def test_a_hopeless_budget_is_flagged_and_nothing_is_ranked() -> None:
    """Check 24 of the specification."""
    rows = measured(points(kernels="exp,taylor2,elu1", vocabulary=256, steps=100, pairs="8", seeds=1))
    assert all(row["status"] == "not_converged" for row in rows)
    assert all(row["values"]["accuracy"] < 0.11 for row in rows)
    section = study.section(rows)
    assert section.verdict == [
        "mqar, 8 pairs: not converged. 0 of 1 exp models reached 0.99 within 100 steps, so nothing is said of the "
        "others; more --steps or a smaller --vocabulary may help."
    ]
    assert [each[2:4] for each in cells(section)] == [
        [kernel, "not converged"] for kernel in ("exp", "taylor2", "elu1")
    ]
    assert section.figures == []
    assert study.summary(rows) == {
        **{kernel: {"mqar:8": None} for kernel in ("exp", "taylor2", "elu1")},
        "converged": {"mqar:8": False},
    }


def test_where_exp_converged_the_others_are_ranked_even_below_the_line() -> None:
    rows = [row("exp", 1.0, n) for n in range(3)]
    rows += [row("relu", accuracy, n) for n, accuracy in enumerate((0.5, 0.6, 0.4))]
    rows += [row("elu1", accuracy, n) for n, accuracy in enumerate((0.9, 0.995, 0.8))]
    section = study.section(rows)
    assert section.verdict == [
        "mqar, 8 pairs: exp recalls it, 0.99 or more with every seed; at 2,000 steps elu1 gets 0.898 [0.800, 0.995], "
        "relu gets 0.500 [0.400, 0.600]."
    ]
    assert cells(section) == [
        ["mqar", "8", "exp", "1.000 [1.000, 1.000]", "500", "3 of 3", "no finite map", "10,240", "–"],
        ["mqar", "8", "elu1", "0.898 [0.800, 0.995]", "500", "1 of 3", "16", "4,160", "13"],
        ["mqar", "8", "relu", "0.500 [0.400, 0.600]", "–", "0 of 3", "16", "4,160", "13"],
    ]
    assert section.figures[0][0] == "recall_accuracy"
    assert study.summary(rows) == {
        "exp": {"mqar:8": 1.0},
        "relu": {"mqar:8": 0.5},
        "elu1": {"mqar:8": 0.8983},
        "converged": {"mqar:8": True},
    }


@pytest.mark.parametrize(
    ("accuracies", "converged"),
    [
        ((1.0, 1.0, 0.3), True),
        ((1.0, 0.3, 0.3), False),
        ((1.0, 0.3), False),
        ((1.0, 1.0, None), True),
        ((None,), False),
    ],
)
def test_a_group_has_converged_when_most_exp_models_have(accuracies: tuple[float | None, ...], converged: bool) -> None:
    rows = [row("exp", accuracy, n) for n, accuracy in enumerate(accuracies)] + [row("relu", 0.999)]
    assert study.summary(rows)["converged"] == {"mqar:8": converged}
    assert ("relu" in study.section(rows).verdict[0]) is converged


def test_without_exp_nothing_is_ranked() -> None:
    section = study.section([row("relu", 0.999)])
    assert section.verdict[0].startswith("mqar, 8 pairs: not converged. No exp model, as none ended, reached 0.99")
    assert section.figures == []


def test_a_kernel_that_failed_once_is_told_and_not_ranked() -> None:
    rows = [row("exp", 1.0, 0), row("exp", 1.0, 1), row("linear", 0.95, 0), row("linear", None, 1)]
    section = study.section(rows)
    assert section.verdict == [
        "mqar, 8 pairs: exp recalls it, 0.99 or more with every seed.",
        "mqar, 8 pairs: linear failed with 1 of 2 seeds (the loss was not finite at step 7) and is not ranked.",
    ]
    assert cells(section)[1][2:6] == ["linear", "failed", "–", "0 of 2"]
    assert study.summary(rows)["linear"] == {"mqar:8": None}


def test_runs_of_other_budgets_put_together_are_groups_of_their_own() -> None:
    rows = [row("exp", 1.0), row("relu", 0.9), row("exp", 0.2, steps=100), row("relu", 0.1, steps=100)]
    assert study.summary(rows)["converged"] == {"mqar:8:steps=2000": True, "mqar:8:steps=100": False}
    first, second = study.section(rows).verdict
    assert first.startswith("mqar, steps 2000, 8 pairs: exp recalls it")
    assert second.startswith("mqar, steps 100, 8 pairs: not converged")


def test_no_rows_make_an_empty_section() -> None:
    section = study.section([])
    assert section.verdict == ["Nothing was measured."] and not section.tables and not section.figures
    assert study.summary([]) == {"converged": {}}


def test_the_figure_has_a_line_for_each_kernel_of_a_converged_group(monkeypatch: Any, tmp_path: Path) -> None:
    charts = pytest.importorskip("pomona.report.charts")
    drawn: list[Any] = []
    monkeypatch.setattr(charts, "curves", lambda stem, title, panels, columns: drawn.extend([stem, *panels]))
    rows = [row("exp", 1.0, pairs=4), row("relu", 0.8, 0, 4), row("relu", 0.6, 1, 4)]
    rows += [row("exp", 1.0, pairs=8), row("relu", 0.5), row("linear", None), row("exp", 0.1, pairs=16)]
    study.draw(rows, tmp_path)
    stem, over_pairs, over_state = drawn
    assert stem == tmp_path / "recall_accuracy"
    exp, relu = over_pairs.series
    assert (exp.label, exp.x, relu.label, relu.x) == ("exp", [4, 8], "relu", [4, 8])
    assert (relu.y, relu.low, relu.high) == (pytest.approx([0.7, 0.5]), [0.6, 0.5], [0.8, 0.5])
    assert over_state.title == "mqar, 8 pairs"
    assert [(each.label, each.x) for each in over_state.series] == [("exp", [10_240]), ("relu", [4160])]
    drawn.clear()
    study.draw([row("exp", 0.1)], tmp_path)
    assert not drawn


# --- the specification's figures -------------------------------------------------------------------------------------


def outcomes(kernels: str, **options: Any) -> dict[str, Outcome]:
    from pomona.methods.attn_compare.kernels import find
    from pomona.methods.attn_compare.recall.training import Trial

    found = {}
    for point in points(kernels=kernels, seeds=1, **options):
        settings = dict(point.settings)
        found[settings["kernel"]] = train(Trial(**{**settings, "kernel": find(settings["kernel"])}))
    return found


def test_eight_pairs_are_recalled_by_softmax_and_taylor2_but_not_by_elu1() -> None:
    """Check 22 of the specification."""
    start = time.process_time()
    found = outcomes("exp,taylor2,elu1", pairs="8")
    for kernel in ("exp", "taylor2"):
        recalled = found[kernel].recalled
        assert recalled is not None and recalled <= 750
    assert found["elu1"].steps == 2000
    assert found["elu1"].accuracy is not None and found["elu1"].accuracy < 0.97
    assert time.process_time() - start < 90
