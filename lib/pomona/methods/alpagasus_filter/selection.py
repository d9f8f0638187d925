"""Which rated records are kept: paper Eq. 1, and what can stand in for or beside a fixed threshold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from pomona.errors import UsageError
from pomona.io.conversation import Turn

CODING_KEYWORDS = ("Java", "java", "C++", "c++", "C#", "c#", "Python", "python")
"""Paper App. E."""

CODING_GROUP = "@coding"


def passes(score: float, threshold: float, *, strict: bool = False) -> bool:
    """G(x) >= tau (Eq. 1), or G(x) > tau when `strict`."""
    return score > threshold if strict else score >= threshold


@dataclass(frozen=True, slots=True)
class Quota:
    """A number of records, `20`, or a share of them, `20%`."""

    number: Fraction
    is_share: bool

    @classmethod
    def parse(cls, text: str, option: str) -> Quota:
        """Raises UsageError, naming `option`, when `text` is neither."""
        body = text.strip()
        try:
            number = Fraction(body.removesuffix("%").strip())
        except (ValueError, ZeroDivisionError):
            number = Fraction(-1)
        share = body.endswith("%")
        if number < 0 or (share and number > 100) or (not share and number.denominator != 1):
            raise UsageError(f"{option} {text}: expected a count such as 500, or a share such as 20%")
        return cls(number / 100 if share else number, share)

    def at_most(self, total: int) -> int:
        """The count as an upper bound: a share of `total` is rounded down."""
        return min(total, math.floor(self.number * total) if self.is_share else int(self.number))

    def at_least(self, total: int) -> int:
        """The count as a floor: a share of `total` is rounded up."""
        return min(total, math.ceil(self.number * total) if self.is_share else int(self.number))


def top(scores: Sequence[float], count: int) -> bytearray:
    """A mask of the `count` highest `scores`; of equals the earlier wins, and NaN (no rating) never does."""
    chosen = bytearray(len(scores))
    for index in _best(scores, range(len(scores)))[:count]:
        chosen[index] = 1
    return chosen


def fill_groups(scores: Sequence[float], groups: Sequence[int], chosen: bytearray, floor: Quota) -> int:
    """Raise every group to its floor in `chosen`, taking its best-rated unchosen records; returns how many were added.

    `groups` holds a group number per record. Records without a rating (NaN) are never taken, so a group of few rated
    records may stay below its floor.
    """
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    added = 0
    for indices in members.values():
        short = floor.at_least(len(indices)) - sum(chosen[index] for index in indices)
        for index in _best(scores, (i for i in indices if not chosen[i]))[: max(0, short)]:
            chosen[index] = 1
            added += 1
    return added


def _best(scores: Sequence[float], indices: Iterable[int]) -> list[int]:
    rated = [index for index in indices if not math.isnan(scores[index])]
    return sorted(rated, key=lambda index: (-scores[index], index))


def balance_rule(text: str) -> tuple[str, Quota]:
    """`FIELD=QUOTA` as a field name and a floor."""
    name, _, quota = text.rpartition("=")
    if not name:
        raise UsageError(f"--balance {text}: expected FIELD=20% or FIELD=500, or {CODING_GROUP}=20%")
    return name, Quota.parse(quota, "--balance")


@dataclass(slots=True)
class Histogram:
    """How many records have each rating, in half points as the paper's judge gave them.

    A rating between two half points, as an expected score is, counts under the lower one.
    """

    low: float
    high: float
    counts: Counter[float] = field(default_factory=Counter)
    unrated: int = 0

    def add(self, score: float | None) -> None:
        if score is None:
            self.unrated += 1
        else:
            self.counts[math.floor(score * 2) / 2] += 1

    def bars(self) -> Iterator[tuple[float, int]]:
        """Every half point of the scale from the lowest up, with its count."""
        first = math.floor(self.low * 2)
        occupied = [math.floor(self.low * 2), math.floor(self.high * 2), *(int(value * 2) for value in self.counts)]
        if max(occupied) - min(occupied) > 40:  # a wide scale: only what occurs
            yield from sorted(self.counts.items())
            return
        for step in range(min(first, *occupied), max(occupied) + 1):
            yield step / 2, self.counts[step / 2]

    def as_dict(self) -> dict[str, int]:
        return {f"{value:g}": count for value, count in sorted(self.counts.items())}

    def lines(self, threshold: float | None) -> list[str]:
        """The table for people, highest rating first, with what a threshold there would keep."""
        total = sum(self.counts.values())
        rows = [f"{'rating':>8} {'records':>9} {'at least':>9}"]
        above = 0
        for value, count in reversed(list(self.bars())):
            above += count
            share = f"{above / total:6.1%}" if total else ""
            mark = "  <- threshold" if threshold is not None and value == threshold else ""
            rows.append(f"{value:8g} {count:9,} {above:9,} {share}{mark}")
        if self.unrated:
            rows.append(f"{'none':>8} {self.unrated:9,}")
        return rows


def coding_keywords(turns: Sequence[Turn]) -> frozenset[str]:
    """The App. E keywords that occur, as they are written, anywhere in instruction, input or output."""
    text = "\n".join(part for turn in turns for part in (turn.instruction, turn.input, turn.output))
    return frozenset(keyword for keyword in CODING_KEYWORDS if keyword in text)


@dataclass(slots=True)
class KeywordCount:
    """Coding records counted both ways: those with any keyword, and the sum over keywords.

    The published 718 before and 85 after fit the sum, which counts a record once per keyword it has.
    """

    records: int = 0
    any_keyword: int = 0
    per_keyword: Counter[str] = field(default_factory=Counter)

    def add(self, keywords: frozenset[str]) -> None:
        self.records += 1
        self.any_keyword += bool(keywords)
        self.per_keyword.update(keywords)

    def as_dict(self) -> dict[str, object]:
        return {
            "records": self.records,
            "any_keyword": self.any_keyword,
            "keyword_sum": self.per_keyword.total(),
            "per_keyword": {keyword: self.per_keyword[keyword] for keyword in CODING_KEYWORDS},
        }


def keyword_lines(before: KeywordCount, after: KeywordCount) -> list[str]:
    """The table of App. E for people, in both counting rules."""

    def row(name: str, was: int, now: int) -> str:
        return f"{name:>16} {was:9,} {now:9,} {1 - now / was:9.2%}" if was else f"{name:>16} {was:9,} {now:9,} {'-':>9}"

    rows = [f"{'':>16} {'before':>9} {'after':>9} {'removed':>9}", row("all records", before.records, after.records)]
    rows.append(row("any keyword", before.any_keyword, after.any_keyword))
    rows.append(row("sum of keywords", before.per_keyword.total(), after.per_keyword.total()))
    rows += [row(name, before.per_keyword[name], after.per_keyword[name]) for name in CODING_KEYWORDS]
    return rows
