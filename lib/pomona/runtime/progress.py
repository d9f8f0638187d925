"""How long work tells of itself, without the library ever printing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Implemented by the command line; a library user may pass `Quiet` or an own one."""

    def start(self, label: str, total: int | None = None) -> None:
        """A stage begins; `total` is its number of steps, None when unknown."""

    def advance(self, steps: int = 1) -> None:
        """Steps of the current stage were done."""

    def note(self, message: str) -> None:
        """A decision worth knowing; shown with --verbose."""

    def warn(self, message: str) -> None:
        """Something the user should look at; shown unless --quiet."""

    def show(self, lines: str) -> None:
        """A table or a short report for people; shown unless --quiet."""


class Quiet:
    """Progress nobody watches."""

    def start(self, label: str, total: int | None = None) -> None:
        return None

    def advance(self, steps: int = 1) -> None:
        return None

    def note(self, message: str) -> None:
        return None

    def warn(self, message: str) -> None:
        return None

    def show(self, lines: str) -> None:
        return None
