"""Which records are kept: the variants' rules over the scores alone. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pomona.methods.ifd_score.config import Ratio, Recipe, base_rule


@dataclass(frozen=True, slots=True)
class Selection:
    """Indices of the kept records in output order, their rank among the eligible (1 = highest score), and how many of
    those with a score were left out, by reason."""

    kept: list[int]
    rank: dict[int, int]
    left_out: dict[str, int]


def select(
    scores: Sequence[float | None], recipe: Recipe, *, keep: Fraction | int | None, least: float | None
) -> Selection:
    """The records that `recipe` keeps.

    Args:
        scores: one IFD per record, None (or NaN) for a record without one.
        keep: share of the rate base, count, or None for all that pass the cut.
        least: lowest score to keep.

    The count is ``int(share * base)`` in exact arithmetic; a count of 0 keeps nothing. The reference turns it into
    everything.
    """
    eligible: list[tuple[float, int]] = []
    left_out = {"above_max_ifd": 0, "below_min_ifd": 0, "not_in_top": 0}
    for index, score in enumerate(scores):
        if score is None or math.isnan(score):
            continue
        if score > recipe.cut or (recipe.strict and score == recipe.cut):
            left_out["above_max_ifd"] += 1
        elif least is not None and score < least:
            left_out["below_min_ifd"] += 1
        else:
            eligible.append((score, index))
    late = -1 if recipe.late_ties else 1
    eligible.sort(key=lambda entry: (-entry[0], late * entry[1]))
    count = wanted(keep, recipe.rate_base, total=len(scores), eligible=len(eligible))
    left_out["not_in_top"] = len(eligible) - min(count, len(eligible))
    top = [index for _, index in eligible[:count]]
    rank = {index: place for place, index in enumerate(top, start=1)}
    return Selection(sorted(top) if recipe.order == "source" else top, rank, {k: n for k, n in left_out.items() if n})


def wanted(keep: Fraction | int | None, rate_base: str, *, total: int, eligible: int) -> int:
    """How many records `keep` asks for."""
    if keep is None:
        return eligible
    if isinstance(keep, int):
        return keep
    base = base_rule(rate_base)
    if not isinstance(base, int):
        base = total if base == "all" else eligible
    return int(keep * base)


def recorded(record: Mapping[str, Any], *, reverse: bool, ratio: Ratio | None) -> tuple[bool, float | None]:
    """Whether `record` carries a score already, and the score if it is usable.

    Understands our own ``ifd`` object and the reference scripts' ``ifd_ppl``, ``ppl_A_direct`` with ``ppl_A_condition``
    and ``ifd_score``.

    Args:
        ratio: which ratio to read; None takes what the record calls its score.
    """
    own = record.get("ifd")
    own = own.get("reverse") if reverse and isinstance(own, Mapping) else own
    if isinstance(own, Mapping) and "status" in own:
        return True, _number(own.get(f"ifd_{ratio}" if ratio else "ifd")) if own["status"] == "ok" else None
    if reverse:
        return False, None
    if "ifd_score" in record and ratio != "ppl":
        return True, _number(record["ifd_score"])
    direct, conditioned = (_number(record.get(f"ppl_A_{part}")) for part in ("direct", "condition"))
    if ratio == "loss" and "ppl_A_direct" in record and "ppl_A_condition" in record:
        usable = direct is not None and conditioned is not None and direct > 1 and conditioned >= 1
        return True, math.log(conditioned) / math.log(direct) if usable and direct and conditioned else None
    if "ifd_ppl" in record and ratio != "loss":
        # The reference writes ppl 0 for a failure such as out-of-memory; the score it derives from it means nothing.
        return True, None if 0.0 in (direct, conditioned) else _number(record["ifd_ppl"])
    return False, None


def _number(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None
