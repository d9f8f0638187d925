"""Trainings of one run: what was asked for and what it is compared with, each with every seed, on the same parts.

Each is trained in one thread, or by all processes of a launch together; finished ones are kept beside the output, and
one that is interrupted goes on from its last state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pomona.io.atomic import writing
from pomona.io.directory import RunDirectory
from pomona.methods.madaug_train import results, training
from pomona.methods.madaug_train.config import Config, contenders
from pomona.methods.madaug_train.recipe import Recipe
from pomona.methods.madaug_train.training import Job, Trained
from pomona.runtime.device import Runtime
from pomona.runtime.jobs import one_thread, side_by_side
from pomona.runtime.progress import Progress, Quiet
from pomona.runtime.settings import Settings


def names(config: Config) -> list[str]:
    """What is trained: first what was asked for, then what it is compared with."""
    asked = "transfer" if config.policy is not None else config.augment
    return list(dict.fromkeys([asked, *contenders(config.compare)]))


def plan(config: Config, settings: Settings, recipe: Recipe, data: Path, dtype: str) -> list[Job]:
    """Every training, seed by seed.

    Args:
        data: folder of the prepared images.
        dtype: number format, "auto" settled.
    """
    return [
        Job(name, seed, recipe, data, dtype, settings.device, config.policy if name == "transfer" else None)
        for seed in range(settings.seed, settings.seed + config.seeds)
        for name in names(config)
    ]


def key(job: Job) -> str:
    """As ``madaug-0``, of what is kept of it."""
    return f"{job.contender}-{job.seed}"


def trained(jobs: Sequence[Job], runtime: Runtime, work: RunDirectory, side: int) -> dict[tuple[str, int], Trained]:
    """Results by contender and seed.

    Args:
        side: how many to train side by side.

    Raises:
        CheckFailed: a loss is not finite.
    """
    left = [job for job in jobs if not _result(job, work.kept).is_file()]
    if runtime.world > 1 or side == 1:
        with one_thread():
            for job in left:
                _keep(job, work.kept, runtime, work.progress)
                work.journal.append(key(job), {})
    else:
        work.progress.start("training", len(jobs))
        work.progress.advance(len(jobs) - len(left))
        for (job, _), _ in side_by_side(_alone, [(job, work.kept) for job in left], side):
            work.journal.append(key(job), {})
            work.progress.advance()
    return {(job.contender, job.seed): results.read(_result(job, work.kept)) for job in jobs}


def _alone(given: tuple[Job, Path]) -> None:
    """A training in a process of its own."""
    job, kept = given
    _keep(job, kept, Runtime.open(job.device, job.dtype, job.seed), Quiet())


def _keep(job: Job, kept: Path, runtime: Runtime, progress: Progress) -> None:
    """Train, from the last state if there is one, and write the result."""
    state = kept / f"{key(job)}.state.safetensors"
    results.write(_result(job, kept), training.train(job, runtime=runtime, checkpoint=state, progress=progress))
    with writing(kept):
        state.unlink(missing_ok=True)


def _result(job: Job, kept: Path) -> Path:
    return kept / f"{key(job)}.safetensors"
