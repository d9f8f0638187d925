"""What can go wrong, and the exit code each kind of failure ends a command with.

Exit code 3 (finished, but some records were rejected or unanswered) is not here: it is a result,
read off the accounting of the run, not a failure of it.
"""

from __future__ import annotations


class PomonaError(Exception):
    """An expected failure: one line for people, and a hint on what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(PomonaError):
    """The command line or the configuration does not make sense."""

    exit_code = 2


class DataError(PomonaError):
    """The input was read, and it is not what it should be."""

    exit_code = 4


class MissingError(PomonaError):
    """An input, a model or a checkpoint is missing or unreadable."""

    exit_code = 5


class OutputError(PomonaError):
    """The output cannot be written: it exists, is locked, is read-only, or the disk is full."""

    exit_code = 6


class UnavailableError(PomonaError):
    """A device or an optional package is not available here."""

    exit_code = 7


class EndpointError(PomonaError):
    """A remote endpoint failed, after retries where a retry could help."""

    exit_code = 8


class CheckFailed(PomonaError):
    """A check on the result failed: non-finite numbers, or a bound that the user set."""

    exit_code = 9
