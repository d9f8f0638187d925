"""The operations that a policy chooses from, with the ranges of the released code, and how strong each one is."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pomona.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy import floating
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Operation:
    """One operation; at magnitude lam in [0, 1] its value is low + lam (high - low).

    Attributes:
        low, high: of a shift as shares of the side, of angles in degrees, of factors, levels (Solarize) or bits.
        signed: the value's sign is turned where an image is mirrored.
        neutral: the magnitude that leaves an image alone; None where the magnitude does not matter.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    signed: bool = False
    neutral: float | None = None


OPERATIONS = (
    Operation("ShearX", -0.3, 0.3, True, 0.5),
    Operation("ShearY", -0.3, 0.3, True, 0.5),
    Operation("TranslateX", -0.45, 0.45, True, 0.5),
    Operation("TranslateY", -0.45, 0.45, True, 0.5),
    Operation("Rotate", -30, 30, True, 0.5),
    Operation("AutoContrast"),
    Operation("Invert"),
    Operation("Equalize"),
    Operation("Solarize", 0, 256, False, 1.0),
    Operation("Posterize", 4, 8, False, 1.0),
    Operation("Contrast", 0.1, 1.9, False, 0.5),
    Operation("Color", 0.1, 1.9, False, 0.5),
    Operation("Brightness", 0.1, 1.9, False, 0.5),
    Operation("Sharpness", 0.1, 1.9, False, 0.5),
    Operation("Cutout", 0, 0.2, False, 0.0),
    Operation("Flip"),
    Operation("Identity"),
)
"""All 17, in the order of the released code."""


HOLE = (125, 123, 114)
"""What Cutout fills its hole with, in colour (released code)."""
GREY_HOLE = 123
"""Its luma by Pillow's formula, for images of one channel."""


def chosen(text: str) -> tuple[Operation, ...]:
    """The operations that `text` names, by comma and in any case, or "all": in the order of `OPERATIONS`.

    Raises:
        UsageError: a name is unknown, or there is nothing to choose between.
    """
    if text.strip().lower() == "all":
        return OPERATIONS
    known = {operation.name.lower(): operation.name for operation in OPERATIONS}
    wanted = [part.strip() for part in text.split(",")]
    for name in wanted:
        if name.lower() not in known:
            near = [known[found] for found in difflib.get_close_matches(name.lower(), known, n=3)]
            raise UsageError(
                f"--ops {name!r} is no operation", hint=f"did you mean {' or '.join(near or known.values())}?"
            )
    lowered = {name.lower() for name in wanted}
    found = tuple(operation for operation in OPERATIONS if operation.name.lower() in lowered)
    if len(found) < 2:
        raise UsageError(
            f"--ops {text} leaves a policy nothing to choose", hint="name two operations or more, Identity among them"
        )
    return found


def strength(operations: Sequence[Operation], magnitudes: NDArray[floating]) -> NDArray[floating]:
    """How far from doing nothing magnitudes (..., K) of the K `operations` are: 0 to 1, (..., K).

    |2 lam - 1| where 0.5 is neutral, 1 - lam for Solarize and Posterize, lam for Cutout; whatever the magnitude, 1 for
    operations that have none and 0 for Identity.
    """
    import numpy as np

    neutral = np.array([np.nan if each.neutral is None else each.neutral for each in operations])
    fixed = np.array([float(each.name != "Identity") for each in operations])
    return np.where(np.isnan(neutral), fixed, np.abs(magnitudes - neutral) / np.maximum(neutral, 1 - neutral))
