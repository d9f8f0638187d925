"""`pomona alpagasus-filter`: rate or join, decide, write, and keep count."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomona.errors import CheckFailed, UsageError
from pomona.io.conversation import BadRecord, Turn, turns
from pomona.io.records import Located, Record
from pomona.io.stream import Stream
from pomona.methods.alpagasus_filter.config import Config
from pomona.methods.alpagasus_filter.parsing import Reader
from pomona.methods.alpagasus_filter.prompts import Prompt, open_prompt
from pomona.methods.alpagasus_filter.ratings import Rating, Ratings
from pomona.methods.alpagasus_filter.selection import (
    CODING_GROUP,
    Histogram,
    KeywordCount,
    Quota,
    balance_rule,
    coding_keywords,
    fill_groups,
    keyword_lines,
    passes,
    top,
)
from pomona.runtime.settings import Settings

if TYPE_CHECKING:
    from pomona.models.budget import Budget
    from pomona.models.loading import Scorer
    from pomona.report.curation import CurationReport

KEY = "alpagasus"
_NAN = float("nan")

Said = tuple[Located, int, tuple[Turn, ...]]
"""A record, its place in the input from 0, and its turns."""


def run(config: Config, settings: Settings, stream: Stream) -> dict[str, Any]:
    """Filter `stream` by rating; returns the summary's own fields.

    Raises:
        UsageError: `--judge openai` without `--model`.
        DataError: the ratings do not fit the records.
        EndpointError: the endpoint refuses what no retry can change.
        CheckFailed: a reply without a rating under `--on-unparsed fail`.
    """
    if config.judge == "openai" and settings.model is None:
        raise UsageError("--judge openai needs --model, the name the endpoint knows the judge by")
    low, high = config.bounds
    reader = Reader(config.parser, low, high, config.dimension)
    prompt = open_prompt(config.prompt, dimension=config.dimension, low=low, high=high)
    if settings.dry_run and config.judge is not None:
        from pomona.methods.alpagasus_filter.plan import plan

        return plan(config, settings, stream, prompt)

    stream.also_reads(Path(config.prompt))
    filtering = _Filtering(config, stream)
    stream.progress.start("rating", None)
    if config.ratings is not None:
        extra = _from_file(config, settings, stream, reader, filtering)
    elif config.judge == "openai":
        extra = _from_endpoint(config, settings, stream, reader, prompt, filtering)
    else:
        extra = _from_model(config, settings, stream, reader, prompt, filtering)
    summary = {**filtering.finish(dry=settings.dry_run), **extra}
    return {**stream.counts.summary(), **summary} if settings.dry_run else summary


# --- where ratings come from -----------------------------------------------------------------------------------------


def _said(stream: Stream) -> Iterator[Said]:
    for located in stream.records():
        try:
            said = turns(located.record, stream.fields)
        except BadRecord as error:
            stream.reject(located, str(error))
            continue
        yield located, stream.counts.read - 1, said


def _from_file(
    config: Config, settings: Settings, stream: Stream, reader: Reader, filtering: _Filtering
) -> dict[str, Any]:
    assert config.ratings is not None
    stream.also_reads(config.ratings)
    ratings = Ratings(config.ratings, join=config.join, id_field=config.id_field, reader=reader, fields=stream.fields)
    if config.join == "index" and stream.output is None:
        # Nothing may reach a pipe before the lengths are known to agree.
        filtering.decide_at_end()
    for located, position, said in _said(stream):
        filtering.add(located, said, ratings.find(located.record, said, position))
    if settings.limit is None or stream.counts.read > ratings.count:
        ratings.check_length(stream.counts.read)
    if stream.counts.read and ratings.count and not ratings.used:
        stream.progress.warn(f"none of the {ratings.count:,} ratings in {config.ratings} belongs to a record")
    return {"ratings": {"in": ratings.count, "used": ratings.used}}


def _from_endpoint(
    config: Config, settings: Settings, stream: Stream, reader: Reader, prompt: Prompt, filtering: _Filtering
) -> dict[str, Any]:
    from pomona.methods.alpagasus_filter import judges
    from pomona.models.chat import ChatClient

    assert settings.model is not None
    # Keys are hashes of whole requests, so the journal of any judge serves; nothing else decides its entries.
    stream.open_journal({"judge": "openai"}, keep=True)
    budget = config.budget()
    rated = judges.api_scores(
        (((located, said), said) for located, _, said in _said(stream)),
        client=ChatClient(config.endpoint(settings.model), stream.journal, budget, stream.progress),
        prompt=prompt,
        reader=reader,
        max_tokens=judges.reply_tokens(config.explain),
        ask_again=config.on_unparsed == "retry",
    )
    for (located, said), rating in rated:
        filtering.add(located, said, rating)
    return {"model": settings.model, "spent": _spent(budget, config)}


def _spent(budget: Budget, config: Config) -> dict[str, Any]:
    """What this run paid; answers found in the journal cost nothing now."""
    spent: dict[str, Any] = {"prompt_tokens": budget.spent.prompt, "completion_tokens": budget.spent.completion}
    if config.price_in is not None and config.price_out is not None:
        spent["cost"] = round(budget.spent_cost, 6)
    return spent


def _from_model(
    config: Config, settings: Settings, stream: Stream, reader: Reader, prompt: Prompt, filtering: _Filtering
) -> dict[str, Any]:
    from pomona.methods.alpagasus_filter import judges

    scorer = _scorer(settings)
    try:
        # As with an endpoint, keys are hashes of everything that decides an entry.
        stream.open_journal({"judge": "local"})
        rated = judges.local_scores(
            (((located, said), said) for located, _, said in _said(stream)),
            scorer=scorer,
            prompt=prompt,
            reader=reader,
            score=config.score or "expected",
            max_tokens=judges.reply_tokens(config.explain),
            batch_size=settings.batch_size,
            journal=stream.journal,
        )
        for (located, said), rating in rated:
            filtering.add(located, said, rating)
    finally:
        scorer.runtime.close()
    return {"model": scorer.identity}


def _scorer(settings: Settings) -> Scorer:
    from pomona.models.loading import load_causal_lm
    from pomona.runtime.device import Runtime

    return load_causal_lm(settings.model, Runtime.open(settings.device, settings.dtype, settings.seed))


def serve(config: Config, settings: Settings) -> None:
    """This process's share of a launch: forward passes of a local judge; there is none of anything else."""
    if config.judge == "local" and not settings.dry_run:
        _scorer(settings).runtime.serve()


# --- what becomes of a rated record ----------------------------------------------------------------------------------


class _Filtering:
    """Decides each record as it is rated or, where the choice needs all ratings, at the end from disk."""

    def __init__(self, config: Config, stream: Stream) -> None:
        self._config = config
        self._stream = stream
        self._histogram = Histogram(*config.bounds)
        self._status: Counter[str] = Counter()
        self._before, self._after = KeywordCount(), KeywordCount()
        self._balance = balance_rule(config.balance) if config.balance is not None else None
        self._report = self._open_report()
        self._reported: Counter[str] = Counter()
        self._at_end = False
        if config.top is not None or self._balance is not None:
            self.decide_at_end()

    def decide_at_end(self) -> None:
        """Set records down on disk until all ratings are known."""
        if not self._at_end:
            self._at_end = True
            self._spool = self._stream.spool()
            self._scores = array("d")  # NaN: kept whatever the choice is
            self._groups = array("L")
            self._group_numbers: dict[str, int] = {}

    def _open_report(self) -> CurationReport | None:
        if self._config.report is None:
            return None
        from pomona.report.curation import CurationReport

        return CurationReport(
            title="alpagasus-filter",
            fields=self._stream.fields,
            threshold=None if self._config.top is not None else self._config.threshold,
            scale=self._config.bounds,
        )

    def add(self, located: Located, said: tuple[Turn, ...], rating: Rating) -> None:
        config, stream = self._config, self._stream
        stream.progress.advance()
        self._status[rating.status] += 1
        if config.keyword_report:
            self._before.add(coding_keywords(said))
        if rating.status in ("ok", "unparsed"):
            self._histogram.add(rating.score)
        record = {**located.record, KEY: rating.as_object(config.dimension)}
        if rating.score is None:
            if rating.status != "unparsed":
                self._set_aside(located, record, rating)
                return
            if config.on_unparsed == "fail":
                raise CheckFailed(
                    f"{located.source}:{located.line}: no rating in the reply {(rating.first_line or '')[:60]!r}",
                    hint="--on-unparsed drop sets such records aside",
                )
            if config.on_unparsed != "keep":
                self._set_aside(located, record, rating)
                return
        if self._at_end:
            self._spool.append(record)
            self._scores.append(_NAN if rating.score is None else rating.score)
            self._groups.append(self._group(located.record, said))
        elif rating.score is None or passes(rating.score, config.threshold, strict=config.strict_gt):
            self._keep(record, said)
        else:
            self._drop(record, "below threshold")

    def _set_aside(self, located: Located, record: Record, rating: Rating) -> None:
        reason: str = rating.status
        if rating.status in ("unanswered", "unasked"):
            self._stream.counts.unanswered += 1
            reason = f"{rating.status}: {rating.detail}"
        self._stream.reject(Located(record, located.source, located.line), reason, fatal=False, detail=rating.detail)
        self._tell(record, kept=False, reason=reason)

    def _group(self, record: Record, said: tuple[Turn, ...]) -> int:
        if self._balance is None:
            return 0
        name, _ = self._balance
        if name == CODING_GROUP:
            return int(bool(coding_keywords(said)))
        value = json.dumps(record.get(name), sort_keys=True, default=str)
        return self._group_numbers.setdefault(value, len(self._group_numbers))

    def _keep(self, record: Record, said: tuple[Turn, ...] | None = None) -> None:
        if self._config.keyword_report:
            self._after.add(coding_keywords(said or turns(record, self._stream.fields)))
        self._stream.emit(record)
        self._tell(record, kept=True)

    def _drop(self, record: Record, reason: str) -> None:
        self._stream.filter(reason)
        self._tell(record, kept=False, reason=reason)

    def _tell(self, record: Record, *, kept: bool, reason: str | None = None) -> None:
        if self._report is not None:
            self._report.add(record, kept, reason)
            if reason is not None:
                self._reported[reason] += 1

    def finish(self, *, dry: bool) -> dict[str, Any]:
        """Decide what was left open, write the report, and return what goes into the summary."""
        stream, config = self._stream, self._config
        stopped = self._status["unasked"] > 0
        summary: dict[str, Any] = {"rated": self._status["ok"], "histogram": self._histogram.as_dict()}
        if self._status["unparsed"]:
            summary["unparsed"] = self._status["unparsed"]
        if stopped:
            stream.incomplete(f"budget: {self._status['unasked']:,} records were not asked about")
            summary["stopped"] = "budget"
        if self._at_end:
            summary |= self._choose(stopped)
        if config.histogram:
            stream.progress.show("\n".join(self._histogram.lines(None if config.top else config.threshold)))
        if config.keyword_report:
            summary["keywords"] = {"before": self._before.as_dict(), "after": self._after.as_dict()}
            stream.progress.show("\n".join(keyword_lines(self._before, self._after)))
        if self._report is not None and config.report is not None and not dry and not stopped:
            unseen = stream.counts.rejected - self._reported
            for reason, count in sorted(unseen.items()):
                self._report.set_aside(reason, count)
            self._report.write(config.report)
            stream.progress.show("\n".join(self._report.summary_lines()))
            summary["report"] = str(config.report)
        return summary

    def _choose(self, stopped: bool) -> dict[str, Any]:
        """Eq. 1 over all ratings at once, or what replaces it, and the floors of `--balance`."""
        config, summary = self._config, dict[str, Any]()
        if config.top is not None:
            chosen = top(self._scores, Quota.parse(config.top, "--top").at_most(self._stream.counts.read))
            reason = "not among the top"
        else:
            chosen = bytearray(passes(s, config.threshold, strict=config.strict_gt) for s in self._scores)
            reason = "below threshold"
        if self._balance is not None and not stopped:
            summary["balanced"] = fill_groups(self._scores, self._groups, chosen, self._balance[1])
        for index, record in enumerate(self._spool):
            if stopped:
                self._drop(record, "undecided: the run stopped")
            elif chosen[index] or self._scores[index] != self._scores[index]:
                self._keep(record)
            else:
                self._drop(record, reason)
        return summary
