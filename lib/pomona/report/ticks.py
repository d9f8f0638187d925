"""Ends of axes and the numbers beside them, written as people write them: 128, 1,024, 10⁻⁶."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

REACH = 1e200  # what lies beyond, or within its inverse of 0, is placed on no axis: ends and ratios would overflow
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 10) -> str:
    """`value` to `digits` digits, plain from 0.0001 up to ten million, as a power of ten beyond."""
    value = float(f"{value:.{digits}g}")
    if value == 0:
        return "0"
    if _plain(value):
        said = f"{value:,.{max(1, digits - 1 - math.floor(math.log10(abs(value))))}f}"
        return said.rstrip("0").rstrip(".").replace("-", "−")
    return _power(value)


def brief(value: float) -> str:
    """`value` to three digits, or to the whole number where that is more."""
    return f"{value:,.0f}".replace("-", "−") if 1e3 <= abs(value) < 1e7 else number(value, 3)


def numbers(values: Sequence[float]) -> list[str]:
    """What stands beside the ticks of one axis: as many decimals for all, or powers of ten for all."""
    if any(value and not _plain(value) for value in values):
        return ["0" if value == 0 else _power(value) for value in values]
    if any(0 < value < 0.1 for value in values) and any(value >= 1 for value in values):  # on a log axis
        return [number(value) for value in values]
    decimals = max((len(number(value).partition(".")[2]) for value in values), default=0)
    return [f"{value:,.{decimals}f}".replace("-", "−") for value in values]


def _plain(value: float) -> bool:
    return 1e-4 <= abs(value) < 1e7


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.5e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".").replace("-", "−")
    power = f"10{str(int(exponent)).translate(_RAISED)}"
    return power if mantissa == "1" else f"−{power}" if mantissa == "−1" else f"{mantissa}×{power}"


def ends(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    """The ends of an axis that shows all of `values`, a little beyond them; some range even where there is none."""
    if not values:
        return (0.1, 10.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        decades = math.log10(high) - math.log10(low)
        room = decades * 0.05 if decades > 1e-9 else math.log10(2)
        return low * 10**-room, high * 10**room
    near = max(abs(low), abs(high))
    room = (high - low) * 0.05 if high - low > 1e-9 * near else near / 2 or 0.5
    return low - room, high + room


def ticks(low: float, high: float, values: Sequence[float], most: int, *, log: bool) -> list[float]:
    """At most about `most` places between `low` and `high`; at the measured `values` where they are few or regular."""
    from matplotlib.ticker import MaxNLocator

    measured = sorted({value for value in values if low <= value <= high})
    if 1 <= len(measured) <= most and _apart(low, high, measured, log=log) >= 1 / (1.6 * most):
        return measured
    if log:
        found = _on_log(low, high, measured, most)
    else:
        whole = all(value == round(value) for value in measured) and high - low >= 2
        locator = MaxNLocator(most, integer=whole, steps=[1, 2, 2.5, 5, 10])
        found = [float(place) for place in locator.tick_values(low, high)]
    slack = 0.0 if log else (high - low) * 1e-9
    return [place for place in found if low - slack <= place <= high + slack]


def _apart(low: float, high: float, places: Sequence[float], *, log: bool) -> float:
    """The least distance of `places`, in order, as a share of the axis."""
    scaled = [math.log10(place) if log else place for place in (low, *places, high)]
    return min((b - a for a, b in pairwise(scaled[1:-1])), default=math.inf) / (scaled[-1] - scaled[0])


def _on_log(low: float, high: float, measured: Sequence[float], most: int) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    ratios = [b / a for a, b in pairwise(measured)]
    if 1 <= len(measured) <= 24 and (not ratios or max(ratios) < 1.01 * min(ratios)) and (ratios or [2])[0] > 1.2:
        return list(measured[:: math.ceil(len(measured) / most)])
    decades = math.log10(high) - math.log10(low)
    if decades < 1:
        return [float(place) for place in MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(low, high) if place > 0]
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil(decades / most))
    parts = (1, 2, 5) if 3 * decades <= most else (1, 3) if 2 * decades <= most else (1,)
    return [part * 10.0**power for power in range(first, last + 1, every) for part in parts]
