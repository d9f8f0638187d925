"""Numbers outside of their range are refused by the name of their option, however large."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from pomona.errors import UsageError
from pomona.runtime.ranges import at_least, positive


@pytest.mark.parametrize("value", [None, 1, 1.0, 10**400])
def test_what_is_in_range_passes(value: Any) -> None:
    options = SimpleNamespace(train_batch=value)
    at_least(options, 1, "train_batch")
    positive(options, "train_batch")


@pytest.mark.parametrize("value", [0, -1, 0.5, math.nan, math.inf])
def test_what_is_below_the_least_or_not_finite_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match=rf"--train-batch is {value}; it must be 1 or more"):
        at_least(SimpleNamespace(train_batch=value), 1, "train_batch")


@pytest.mark.parametrize("value", [0, -1e-9, math.nan, math.inf])
def test_what_is_not_positive_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match=rf"--learning-rate must be positive, not {value}"):
        positive(SimpleNamespace(seeds=1, learning_rate=value), "seeds", "learning_rate")
