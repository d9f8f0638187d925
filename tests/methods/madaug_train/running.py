"""The method as the command line runs it, without a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pomona.io.directory import RunDirectory
from pomona.methods.madaug_train import run
from pomona.methods.madaug_train.config import Config
from pomona.runtime.progress import Quiet
from pomona.runtime.settings import Settings


def execute(*inputs: str, config: Config, output: Path | None = None, **settings: Any) -> tuple[dict[str, Any], int]:
    """Summary and exit code."""
    chosen = Settings(**{"device": "cpu", **settings}, output=output)
    described = {"config": config, "batch_size": chosen.batch_size, "seed": chosen.seed}
    work = RunDirectory("madaug-train", inputs, chosen, described=described, progress=Quiet(), emit=print)
    with work:
        summary, code = run.run(config, chosen, work)
    if work.failure is not None:
        raise work.failure
    return summary, code
