"""Conversions as the command runs them, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pomona.io.directory import RunDirectory
from pomona.methods.meo_convert import run
from pomona.methods.meo_convert.config import Config
from pomona.runtime.progress import Quiet
from pomona.runtime.settings import Settings

SETTINGS = ("seed", "resume", "overwrite", "dry_run", "dtype", "batch_size", "limit")


class Told(Quiet):
    """Keeps what a person would have seen."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.warned: list[str] = []

    def show(self, text: str) -> None:
        self.shown.append(text)

    def warn(self, message: str) -> None:
        self.warned.append(message)


def go(source: Path | str, output: Path | None, **given: Any) -> tuple[dict[str, Any], RunDirectory, Told]:
    """The summary, what is left of the work, and what was said."""
    told = {name: given.pop(name) for name in SETTINGS if name in given}
    settings, config, progress = Settings(output=output, device="cpu", **told), Config(**given), Told()
    work = RunDirectory(
        "meo-convert",
        (str(source),),
        settings,
        described={"config": config, "seed": settings.seed},
        progress=progress,
        emit=lambda record: None,
    )
    with work:
        summary, code = run.run(config, settings, work)
    assert code == 0
    return summary, work, progress


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_bytes())
    return found


def sentences(file: Path, *texts: str, labels: tuple[str, ...] = ()) -> Path:
    """A JSONL file of `texts`, and of `labels` in turn."""
    rows = [
        {"text": text} | ({"label": labels[place % len(labels)]} if labels else {}) for place, text in enumerate(texts)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


TEXTS = (
    "the film was not very good",
    "the play was bad",
    "the book was great",
    "the meal was not awful",
    "the song was very dull",
    "the game was lovely",
)
