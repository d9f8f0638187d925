"""How light a colour is, to choose the ink upon it."""

from __future__ import annotations

from collections.abc import Sequence

MIDDLE = 0.179  # black and white have the same contrast on it


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance, as WCAG defines it, of red, green and blue from 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
