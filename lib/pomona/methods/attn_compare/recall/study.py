"""The study `recall`: small models that differ in their kernel alone, trained to recall, and what they recall."""

from __future__ import annotations

import time
from typing import Any

from pomona.methods.attn_compare import kernels
from pomona.methods.attn_compare.config import Config
from pomona.methods.attn_compare.recall import options
from pomona.methods.attn_compare.recall.findings import YARDSTICK, draw, section, summary
from pomona.methods.attn_compare.recall.models import state_bytes
from pomona.methods.attn_compare.recall.training import RECALLED, Trial, train
from pomona.methods.attn_compare.rows import Point, Workshop
from pomona.runtime.progress import Progress
from pomona.runtime.settings import Settings

__all__ = ["draw", "measure", "plan", "prepare", "section", "sources", "summary"]

STUDY = "recall"
KERNELS = "exp,taylor2,inline,dpfp:1,elu1,relu,hedgehog,favor:64"


def plan(config: Config, settings: Settings) -> list[Point]:
    """Every kernel on every task with every number of pairs, each as often as there are seeds.

    exp is always among the kernels, and first: without it nothing could be said of the others.

    Raises:
        UsageError: a kernel is unknown.
    """
    chosen = kernels.chosen(f"{YARDSTICK},{config.kernels or KERNELS}")
    common = {
        "vocabulary": config.vocabulary,
        "feature_dim": config.feature_dim,
        "steps": config.steps,
        "seed": settings.seed,
    }
    return [
        Point(
            STUDY,
            f"{STUDY}/{task}/{pairs}/{kernel.name}/{number}",
            {"task": task, "pairs": pairs, "kernel": kernel.name, "number": number, **common},
        )
        for task in options.tasks(config.task)
        for pairs in options.pairs(config.pairs)
        for kernel in chosen
        for number in range(config.seeds)
    ]


def sources(config: Config, settings: Settings) -> dict[str, Any]:
    """Nothing is read."""
    return {}


def prepare(config: Config, settings: Settings, shop: Workshop, progress: Progress) -> None:
    """Points share nothing."""


def measure(point: Point, shop: Workshop) -> list[dict[str, Any]]:
    """The row of one trained model.

    Its status is `done` where it recalled, `not_converged` where it ended below, `failed` where training broke off.
    Whether its group converged only the rows of exp tell; see `findings`.
    """
    settings = dict(point.settings)
    kernel = kernels.find(settings.pop("kernel"))
    trial = Trial(kernel=kernel, **settings)
    clock, processor = time.perf_counter(), time.process_time()
    outcome = train(trial, shop.device)
    timing = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - processor}
    row: dict[str, Any] = {"study": STUDY, "kernel": kernel.name, "point": settings, "status": "done"}
    if outcome.fault is not None:
        row |= {"status": "failed", "reason": outcome.fault}
    elif outcome.recalled is None:
        row |= {"status": "not_converged", "reason": f"accuracy below {RECALLED} at {outcome.steps} steps"}
    values = {
        "accuracy": outcome.accuracy,
        "steps_to_99": outcome.recalled,
        "steps": outcome.steps,
        "loss": outcome.loss,
        "features": kernel.features(trial.feature_dim),
        "state_bytes": state_bytes(kernel, trial.feature_dim, 4 * trial.pairs),
    }
    return [{**row, "values": values, "timing": timing}]
