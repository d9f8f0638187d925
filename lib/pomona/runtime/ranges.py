"""Ranges of options, and what is said of a number outside of them."""

from __future__ import annotations

import math

from pomona.errors import UsageError


def at_least(options: object, least: int, *names: str) -> None:
    """Refuse numbers below `least`, or not finite, among the fields `names` of `options`; None is left alone.

    Raises:
        UsageError: there is one.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise UsageError(f"{_flag(name)} is {value}; it must be {least} or more")


def positive(options: object, *names: str) -> None:
    """The same of numbers that are not above 0.

    Raises:
        UsageError: there is one.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{_flag(name)} must be positive, not {value}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
