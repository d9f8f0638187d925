"""The options of `pomona alpagasus-filter`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pomona.errors import UsageError
from pomona.methods.alpagasus_filter.selection import Quota, balance_rule
from pomona.models.options import EndpointOptions


@dataclass(frozen=True)
class Config(EndpointOptions):
    """Where the ratings come from, how a reply is read, and which records pass."""

    ratings: Annotated[
        Path | None, "ratings made earlier: a JSON array or JSONL of numbers or objects (score, rating, review, ...)"
    ] = None
    join: Annotated[
        Literal["content", "id", "index"], "what ties a rating to its record; position is checked for equal length"
    ] = "content"
    id_field: Annotated[str, "the field that names a record, for --join id"] = "id"
    judge: Annotated[
        Literal["openai", "local"] | None, "rate the records now: an OpenAI-compatible endpoint, or a local model"
    ] = None
    score: Annotated[
        Literal["expected", "greedy"] | None,
        "local judge: expected, the probability-weighted mean over the scale's whole points (default), or greedy, the "
        "number it writes",
    ] = None
    dimension: Annotated[str, "what is rated: accuracy, helpfulness, or any words (paper section 2.2)"] = "accuracy"
    prompt: Annotated[
        str, "prompt layout: repo, paper (Fig. 3), rubric-first, or a file with {instruction} {input} {output}"
    ] = "repo"
    explain: Annotated[bool, "ask for the paper's 256-token explanation too; the default asks for the score only"] = (
        False
    )
    scale: Annotated[str, "lowest and highest rating, LOW:HIGH (paper: 0 to 5)"] = "0:5"
    threshold: Annotated[float, "keep records rated at least this (paper Eq. 1: tau)"] = 4.5
    strict_gt: Annotated[bool, "keep only records rated above the threshold"] = False
    top: Annotated[str | None, "keep the best N, or P% of all records, instead of cutting at the threshold"] = None
    on_unparsed: Annotated[
        Literal["drop", "keep", "fail", "retry"],
        "a reply without a readable rating: reject, keep, stop, or ask the endpoint once more",
    ] = "drop"
    parser: Annotated[
        Literal["robust", "reference"], "how a reply is read; reference is the released rule: first line or -1"
    ] = "robust"
    balance: Annotated[
        str | None, "FIELD=P% or FIELD=N: of each value of FIELD keep at least that; @coding groups by App. E keywords"
    ] = None
    histogram: Annotated[bool, "print how many records have each rating"] = False
    keyword_report: Annotated[bool, "count coding keywords before and after (paper App. E)"] = False
    report: Annotated[Path | None, "write a Markdown report with plots"] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratings is None) == (self.judge is None):
            raise UsageError(
                "give exactly one of --ratings and --judge",
                hint="--ratings FILE uses ratings you have; --judge local rates with the embedded model",
            )
        low, high = self.bounds
        if not low <= self.threshold <= high:
            raise UsageError(f"--threshold {self.threshold:g} is off the scale {self.scale}")
        if not self.dimension.strip():
            raise UsageError("--dimension is empty")
        if self.top is not None:
            Quota.parse(self.top, "--top")
        if self.balance is not None:
            balance_rule(self.balance)
        if self.score is not None and self.judge != "local":
            raise UsageError("--score is for --judge local: an endpoint writes its rating, and that is read")

    @property
    def bounds(self) -> tuple[float, float]:
        """The scale as two numbers (UsageError if it is not LOW:HIGH)."""
        low, _, high = self.scale.partition(":")
        try:
            bounds = float(low), float(high)
        except ValueError:
            bounds = math.nan, math.nan
        if not (math.isfinite(bounds[0]) and math.isfinite(bounds[1]) and bounds[0] < bounds[1]):
            raise UsageError(f"--scale {self.scale}: expected LOW:HIGH, e.g. 0:5")
        return bounds
