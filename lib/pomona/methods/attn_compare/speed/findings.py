"""What the rows of the speed study say: where linear attention overtakes softmax, and by how much it is ahead."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pomona.methods.attn_compare.rows import Row
from pomona.methods.attn_compare.speed.crossover import Crossover, crossover

BASELINE = "sdpa"
PASS_NAMES = {"fwd": "forward", "train": "forward and backward", "decode": "one step of decoding"}
_LINEAR_TIME = ("chunked", "full", "state")  # the forms that are ours to recommend


class Place(NamedTuple):
    """What a group of timings has in common: only within it can they be compared."""

    way: str
    width: int
    heads: int
    causal: bool
    device: str
    dtype: str
    threads: int

    @classmethod
    def of(cls, row: Row) -> Place:
        point = row["point"]
        return cls(point["pass"], point["dim"], *(point[name] for name in cls._fields[2:]))

    def named(self, places: Collection[Place], *, brief: bool = False) -> str:
        """Pass and width, and whatever else tells it from other `places`."""
        told = f"{self.way} d={self.width}" if brief else f"{PASS_NAMES[self.way]}, head width {self.width}"
        apart = {
            "heads": f"{self.heads} heads",
            "causal": "causal" if self.causal else "full",
            "device": self.device,
            "dtype": self.dtype,
            "threads": f"{self.threads} threads",
        }
        return ", ".join([told, *(s for name, s in apart.items() if len({getattr(p, name) for p in places}) > 1)])

    @property
    def conditions(self) -> str:
        """Everything besides pass and width, for people."""
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        return f"{self.heads} heads, {'causal' if self.causal else 'full'}, {self.dtype} on {self.device}, {threads}"


# implementation -> length -> row, of what was timed
Curves = Mapping[str, Mapping[int, Row]]


@dataclass(frozen=True)
class Overtaking:
    """A linear form against SDPA in one pass at one width of head.

    Attributes:
        place: where both were timed.
        name: of the place among those of the report.
        kernel: of the linear form.
        features: r.
        implementation: the form with its kernel.
        crossover: where it overtakes.
        longest: the longest length at which both were timed.
        ratio: how many times as fast it is there; below one, it is slower.
    """

    place: Place
    name: str
    kernel: str
    features: int
    implementation: str
    crossover: Crossover
    longest: int
    ratio: float


def groups(rows: Sequence[Row]) -> dict[Place, list[Row]]:
    """Rows by place, in order."""
    found: dict[Place, list[Row]] = {}
    for row in rows:
        found.setdefault(Place.of(row), []).append(row)
    return found


def curves(rows: Sequence[Row]) -> Curves:
    """The timed rows of one group."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["status"] == "done":
            found.setdefault(row["point"]["implementation"], {})[row["point"]["length"]] = row
    return found


def overtakings(rows: Sequence[Row]) -> list[Overtaking]:
    """Every linear-time form against SDPA, wherever both were timed."""
    found = []
    places = groups(rows)
    for place, group in places.items():
        timed = curves(group)
        for name, by_length in timed.items():
            if name.split(" ")[0] not in _LINEAR_TIME or BASELINE not in timed:
                continue
            softmax = timed[BASELINE]
            lengths = sorted(by_length.keys() & softmax.keys())
            if not lengths:
                continue
            incumbent, challenger = ([side[n]["timing"]["ms_all"] for n in lengths] for side in (softmax, by_length))
            first, longest = by_length[lengths[0]], lengths[-1]
            ratio = softmax[longest]["timing"]["ms"] / by_length[longest]["timing"]["ms"]
            where = crossover(lengths, incumbent, challenger)
            features = first["values"]["features"]
            found.append(Overtaking(place, place.named(places), first["kernel"], features, name, where, longest, ratio))
    return found


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Per place and kernel: where it overtakes SDPA (None: nowhere in the range) and its lead at the longest."""
    found: dict[str, Any] = {"crossover": {}, "at_longest": {}}
    places = groups(rows)
    for each in overtakings(rows):
        name, at = each.place.named(places, brief=True), each.crossover
        found["crossover"].setdefault(name, {})[each.kernel] = {
            "at": _whole(at.at),
            "where": at.where,
            "low": _whole(at.low),
            "high": _whole(at.high),
        }
        found["at_longest"].setdefault(name, {})[each.kernel] = {
            "length": each.longest,
            "times_as_fast": round(each.ratio, 2),
        }
    counts = {status: sum(row["status"] == status for row in rows) for status in ("done", "skipped", "failed")}
    return {**found, "points": counts, "noisy": sum(noisy(row) for row in rows)}


def noisy(row: Row) -> bool:
    """The row was timed, and the machine disturbed it."""
    return bool(row.get("timing", {}).get("noisy"))


def sentence(each: Overtaking) -> str:
    """What an overtaking means, for people."""
    at = each.crossover
    told = f"{each.name[0].upper()}{each.name[1:]}: {each.implementation}"
    lead = f"{_times(each.ratio)} as fast as SDPA at n = {each.longest:,}"
    if at.where == "beyond":
        behind = f"takes {_times(1 / each.ratio)} as long"
        return f"{told} does not overtake SDPA up to n = {each.longest:,}, where it {behind}."
    if at.where == "below" or at.at is None:
        return f"{told} is ahead of SDPA at every length measured, and {lead}."
    low = "below the shortest" if at.low is None else f"{at.low:,.0f}"
    high = "beyond the longest" if at.high is None else f"{at.high:,.0f}"
    return f"{told} overtakes SDPA at about n = {at.at:,.0f} (interval {low} to {high}), and is {lead}."


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:.0f} times"


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
