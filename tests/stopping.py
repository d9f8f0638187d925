"""Trainings that are broken off at a step."""

from __future__ import annotations

from pomona.runtime.progress import Quiet


class Stop(Exception):
    """A run that is broken off."""


class Stopping(Quiet):
    """Breaks the run off after some steps, and knows what it was told."""

    def __init__(self, after: int | None = None) -> None:
        self.after, self.advanced, self.told = after, [], []  # type: tuple[int | None, list[int], list[str]]

    def advance(self, steps: int = 1) -> None:
        self.advanced.append(steps)
        if self.after is not None and sum(self.advanced) == self.after:
            raise Stop

    def warn(self, message: str) -> None:
        self.told.append(message)

    def note(self, message: str) -> None:
        self.told.append(message)
