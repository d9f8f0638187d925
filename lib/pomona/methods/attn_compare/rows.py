"""What a study measures and what it says of it: points of work, rows of results, a section of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pomona.methods.attn_compare.config import Config
from pomona.report.sections import Section
from pomona.runtime.progress import Progress
from pomona.runtime.settings import Settings

# One result, as a line of results.jsonl holds it: "study", "kernel", "point" (what it is a result of), "status" (done,
# skipped, failed or not_converged), "reason" where it is not done, "values" with their "intervals" ([low, high]) and
# "theory" under the same names, and "timing", which alone is not the same in every run.
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """A piece of work: small enough to be lost, large enough to be worth a line of the journal.

    Attributes:
        study: whose it is.
        name: unique within the run, and readable; results appear in the order of the plan.
        settings: everything `measure` needs besides the workshop, as JSON holds it.
    """

    study: str
    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Workshop:
    """Where points are measured.

    Attributes:
        scratch: a folder for what `prepare` leaves and `measure` reads; it goes when the run ends.
        device: where tensors live, as ``cpu`` or ``cuda:0``.
    """

    scratch: Path
    device: str


class Study(Protocol):
    """The functions of each study's module."""

    def plan(self, config: Config, settings: Settings) -> list[Point]:
        """The points to measure, in order; refuses options that make no sense (`UsageError`), without heavy work."""

    def sources(self, config: Config, settings: Settings) -> dict[str, Any]:
        """Digests of what the study reads, for the fingerprint of the run; `MissingError` where it is not there."""

    def prepare(self, config: Config, settings: Settings, shop: Workshop, progress: Progress) -> None:
        """Do once what all points share, leaving it in the scratch folder."""

    def measure(self, point: Point, shop: Workshop) -> list[dict[str, Any]]:
        """The rows of one point, the same whichever process measures it, and when; timings apart."""

    def summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What the summary line says of the study."""

    def section(self, rows: Sequence[Row]) -> Section:
        """What the report says of the study."""

    def draw(self, rows: Sequence[Row], folder: Path) -> None:
        """The figures that `section` names, as PNG and SVG in `folder`."""
