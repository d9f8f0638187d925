"""The method as the command line runs it, without a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pomona.io.directory import RunDirectory
from pomona.io.single import RunFile
from pomona.methods.diffeat_extract import run
from pomona.methods.diffeat_extract.config import Config
from pomona.runtime.progress import Quiet
from pomona.runtime.settings import Settings


def execute(*inputs: str, config: Config | None = None, output: Path | None = None, **settings: Any) -> Any:
    """Summary, exit code, and the rows that went to standard output."""
    chosen, options = Settings(**{"device": "cpu", **settings}, output=output), config or Config()
    rows: list[Any] = []
    work = (RunFile if output is not None and output.suffix else RunDirectory)(
        "diffeat-extract",
        inputs,
        chosen,
        described={"config": options, "batch_size": chosen.batch_size, "seed": chosen.seed},
        progress=Quiet(),
        emit=rows.append,
    )
    with work:
        summary, code = run.run(options, chosen, work)
    if work.failure is not None:
        raise work.failure
    return summary, code, rows
