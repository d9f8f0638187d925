"""What a selection did to a set of records: counts, distributions, and the records worth looking at."""

from __future__ import annotations

import heapq
import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomona.io.atomic import atomic_file
from pomona.io.conversation import BadRecord, Fields, turns
from pomona.report.text import escape, one_line

_SHOWN = 5
_CELL = 90  # characters of a text that a report shows
_LINE = 56  # and a terminal
_BARS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True, slots=True)
class Example:
    """A record worth looking at, its texts already cut to what is shown."""

    ifd: float
    rating: float | None
    kept: bool
    instruction: str
    answer: str


class CurationReport:
    """Fed record by record; holds two numbers and a flag for each, and ten examples.

    It reads the `ifd` and `alpagasus` objects that the records carry, whichever command put them there.
    """

    def __init__(
        self,
        *,
        title: str,
        fields: Fields | None = None,
        threshold: float | None = None,
        scale: tuple[float, float] = (0.0, 5.0),
    ) -> None:
        """
        Args:
            title: the report's heading.
            threshold: the rating from which records were kept, where there was one.
            scale: lowest and highest rating.
        """
        self.title = one_line(title, _CELL)
        self.threshold = threshold
        self.scale = scale
        self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.dimension: str | None = None
        self._fields = fields or Fields()
        self._ratings, self._ifd = array("d"), array("d")  # NaN: the record has none
        self._flags = bytearray()
        # Heaps of (IFD, -place, example): the smallest goes first, so of equals the earlier record stays.
        self._hardest: list[tuple[float, int, Example]] = []
        self._misaligned: list[tuple[float, int, Example]] = []

    @property
    def total(self) -> int:
        return self.kept + self.dropped.total()

    def add(self, record: Mapping[str, Any], kept: bool, reason: str | None = None) -> None:
        """Count `record`; `reason` says why it was dropped."""
        if kept:
            self.kept += 1
        else:
            self.dropped[reason or "dropped"] += 1
        rating = _number(record.get("alpagasus"), "score")
        ifd = _number(record.get("ifd"), "ifd")
        if self.dimension is None and isinstance(record.get("alpagasus"), Mapping):
            self.dimension = one_line(str(record["alpagasus"].get("dimension") or ""), 40) or None
        self._ratings.append(math.nan if rating is None else rating)
        self._ifd.append(math.nan if ifd is None else ifd)
        self._flags.append(kept)
        if ifd is not None:
            heap = self._misaligned if ifd > 1 else self._hardest
            place = -len(self._flags)
            if len(heap) < _SHOWN or (ifd, place) > heap[0][:2]:
                entry = (ifd, place, self._example(record, ifd, rating, kept))
                (heapq.heappush if len(heap) < _SHOWN else heapq.heapreplace)(heap, entry)

    def set_aside(self, reason: str, count: int) -> None:
        """Count records that were never seen whole, such as malformed lines."""
        self.dropped[reason] += count

    def _example(self, record: Mapping[str, Any], ifd: float, rating: float | None, kept: bool) -> Example:
        try:
            last = turns(record, self._fields)[-1]
        except BadRecord:
            return Example(ifd, rating, kept, "", "")
        asked = f"{last.instruction} {last.input}" if last.input else last.instruction
        return Example(ifd, rating, kept, one_line(asked, _CELL), one_line(last.output, _CELL))

    def hardest(self) -> list[Example]:
        """The records of highest IFD up to 1, highest first."""
        return [example for *_, example in sorted(self._hardest, key=lambda e: e[:2], reverse=True)]

    def misaligned(self) -> list[Example]:
        """The records of highest IFD above 1, highest first."""
        return [example for *_, example in sorted(self._misaligned, key=lambda e: e[:2], reverse=True)]

    # --- Markdown ----------------------------------------------------------------------------------------------------

    def write(self, path: Path) -> None:
        """Write the report to `path`, and its plots beside it: `STEM-ratings.png` and `STEM-ifd.png`."""
        from pomona.report.plots import ifd_plot, ratings_plot

        plots: list[tuple[str, str]] = []

        def place(kind: str, described: str) -> Path:
            name = f"{path.stem}-{kind}.png"
            plots.append((name, described))
            return path.with_name(name)

        ratings, kept = self._known(self._ratings)
        if len(ratings):
            named = f"Ratings: {self.dimension}" if self.dimension and self.dimension.isascii() else "Ratings"
            where = place("ratings", "ratings, kept and dropped")
            ratings_plot(where, named, ratings, kept, threshold=self.threshold, scale=self.scale)
        ifd, kept = self._known(self._ifd)
        if len(ifd):
            where = place("ifd", "instruction-following difficulty, kept and dropped")
            ifd_plot(where, "Instruction-following difficulty", ifd, kept)
        with atomic_file(path) as file:
            file.write("\n".join(self._markdown(plots)).encode("utf-8"))

    def _markdown(self, plots: Sequence[tuple[str, str]]) -> Iterator[str]:
        yield f"# {escape(self.title)}\n"
        yield "| | records | share |\n|---|---:|---:|"
        for name, count in (("in", self.total), ("**kept**", self.kept)):
            yield f"| {name} | {count:,} | {self._share(count)} |"
        for reason, count in self._reasons():
            yield f"| dropped: {escape(one_line(reason, _CELL))} | {count:,} | {self._share(count)} |"
        yield ""
        for name, described in plots:
            yield f"![{described}]({_link(name)})\n"
        for heading, said, examples in (
            ("Hardest", "Highest IFD up to 1: the instruction helps least, while it still helps.", self.hardest()),
            ("Misaligned", "Highest IFD above 1: the answer is likelier without its instruction.", self.misaligned()),
        ):
            if examples:
                yield f"## {heading}\n\n{said}\n"
                yield "| IFD | rating | | instruction | answer |\n|---:|---:|---|---|---|"
                for e in examples:
                    rating = "" if e.rating is None else f"{e.rating:g}"
                    fate = "kept" if e.kept else "dropped"
                    yield f"| {e.ifd:.3f} | {rating} | {fate} | {escape(e.instruction)} | {escape(e.answer)} |"
                yield ""

    # --- a terminal --------------------------------------------------------------------------------------------------

    def summary_lines(self, width: int = 80) -> list[str]:
        """The same, short, as plain lines of at most `width` columns."""
        lines = [f"{self.total:,} in, {self.kept:,} kept ({self._share(self.kept)})"]
        reasons = [("kept", self.kept), *self._reasons()]
        lines += _bars([(one_line(name, 28), count) for name, count in reasons], width)
        for heading, values, edges in (
            (f"ratings{f' ({self.dimension})' if self.dimension else ''}", self._ratings, self._rating_steps()),
            ("IFD", self._ifd, [i / 5 for i in range(7)]),
        ):
            known, _ = self._known(values)
            if len(known):
                lines += ["", heading, *_bars(_binned(known, edges), width)]
                if heading == "IFD":
                    lines.append(f"  {int((known > 1).sum()):,} above 1 (misaligned)")
        for heading, examples in (
            ("hardest (IFD up to 1)", self.hardest()),
            ("misaligned (IFD above 1)", self.misaligned()),
        ):
            if examples:
                lines += ["", heading]
                room = min(_LINE, width - 20)
                for e in examples:
                    rating = "   -" if e.rating is None else f"{e.rating:4.1f}"
                    fate = "kept" if e.kept else "    "
                    lines.append(f"  {e.ifd:7.3f} {rating} {fate} {one_line(e.instruction, room)}")
        return lines

    def _rating_steps(self) -> list[float]:
        low, high = self.scale
        step = 0.5 if high - low <= 10 else (high - low) / 10
        return [low + step * i for i in range(round((high - low) / step) + 1)]

    def _known(self, values: array[float]) -> tuple[Any, Any]:
        import numpy as np

        numbers = np.array(values, dtype=np.float64)
        known = ~np.isnan(numbers)
        return numbers[known], np.array(self._flags, dtype=bool)[known]

    def _reasons(self) -> list[tuple[str, int]]:
        return sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))

    def _share(self, count: int) -> str:
        return f"{count / self.total:.1%}" if self.total else "-"


def _number(value: Any, key: str) -> float | None:
    """A finite number under `key` of an object, else None."""
    number = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    try:
        return float(number) if math.isfinite(number) else None
    except OverflowError:
        return None


def _link(name: str) -> str:
    from urllib.parse import quote

    return quote(name)


def _binned(values: Any, edges: Sequence[float]) -> list[tuple[str, int]]:
    """Counts from each edge up to the next; the first and last also take what lies outside."""
    import numpy as np

    places = np.clip(np.searchsorted(np.asarray(edges), values, side="right") - 1, 0, len(edges) - 1)
    counts = np.bincount(places, minlength=len(edges))
    return [(f"{edge:g}", int(count)) for edge, count in zip(edges, counts, strict=True)]


def _bars(rows: Sequence[tuple[str, int]], width: int) -> list[str]:
    label = max(len(name) for name, _ in rows)
    most = max(1, *(count for _, count in rows))
    room = max(8, width - label - 14)
    return [f"  {name:>{label}} {count:9,} {_bar(count / most * room)}".rstrip() for name, count in rows]


def _bar(length: float) -> str:
    """A bar of `length` columns, to an eighth of a column; something is never shown as nothing."""
    eighths = max(round(length * 8), 1 if length > 0 else 0)
    return "█" * (eighths // 8) + _BARS[eighths % 8].strip()
