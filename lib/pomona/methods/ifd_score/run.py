"""`pomona ifd-score`: records in, the same records with their score out, or only the selected ones."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pomona.errors import CheckFailed
from pomona.io.conversation import BadRecord, Turn, turns
from pomona.io.records import Located, Record
from pomona.io.stream import Spool, Stream
from pomona.methods.ifd_score.config import Config, Recipe, keep_rule, resolve
from pomona.methods.ifd_score.selection import recorded, select
from pomona.runtime.settings import Settings

if TYPE_CHECKING:
    from pomona.methods.ifd_score.passages import Codec
    from pomona.methods.ifd_score.scoring import Window
    from pomona.methods.ifd_score.templates import Template
    from pomona.models.loading import Scorer
    from pomona.runtime.device import Runtime

_FIRST_WINDOW = 16  # small, so that the first record is out soon; later windows double up to --sort-window
_SELECTION_ONLY = ("cut", "strict", "rate_base", "order", "late_ties", "ratio")

Read = tuple[Record, tuple[Turn, ...]]
Chunk = list[Read]


def run(config: Config, settings: Settings, stream: Stream) -> dict[str, Any]:
    """Score the records of `stream`, or choose among records scored earlier.

    Returns:
        for the summary: what scored (`model`), and how many records have each status. With `dry_run` the plan.
    """
    recipe = resolve(config)
    source = stream.records()
    first = next(source, None)
    records = itertools.chain([] if first is None else [first], source)
    scored = first is not None and recorded(first.record, reverse=recipe.reverse, ratio=config.ratio)[0]
    if first is not None and not settings.dry_run and not (config.selects and scored and not config.rescore):
        return _score(config, recipe, settings, records, stream)
    _dismiss(settings)
    if first is None or not settings.dry_run:
        return _choose_among_scored(config, recipe, records, stream)
    return _plan(config, recipe, settings, records, stream)


def serve(config: Config, settings: Settings) -> None:
    """This process's share of the work that the main process of a launch hands out."""
    if config.experience is not None:
        from pomona.methods.ifd_score import experience

        # Decided before the processes meet, as in the main one, which trains only after they have met.
        wanted = experience.described(config, resolve(config), settings)
        if experience.finished(config.experience, wanted, overwrite=settings.overwrite) is None:
            _base(config, settings).runtime.serve()
            if not (config.experience / experience.MARKER).exists():
                return
    _scorer(config, settings).runtime.serve()


def _dismiss(settings: Settings) -> None:
    """Let the other processes of a launch end when there is nothing for a model to do."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from pomona.runtime.device import Runtime

        Runtime.open(settings.device, settings.dtype, settings.seed).close()


class _Kept:
    """Where records go that have their score: out at once, or set down until all are known."""

    def __init__(self, config: Config, recipe: Recipe, stream: Stream) -> None:
        self._config, self._recipe, self._stream = config, recipe, stream
        self._spool: Spool | None = stream.spool() if config.selects else None
        self._scores = array("d")
        self._unusable: Counter[str] = Counter()

    def add(self, record: Record, score: float | None, status: str) -> None:
        if self._spool is None:
            self._stream.emit(record)
            return
        self._spool.append(record)
        self._scores.append(math.nan if score is None else score)
        if score is None:
            self._unusable[status] += 1

    def finish(self) -> None:
        """Make the choice and write what was chosen."""
        if self._spool is None:
            return
        keep = keep_rule(self._config.keep_top)
        chosen = select(self._scores, self._recipe, keep=keep, least=self._config.min_ifd)
        for reason, count in (self._unusable + Counter(chosen.left_out)).items():
            for _ in range(count):
                self._stream.filter(reason)
        for index in chosen.kept:
            record = self._spool[index]
            own = dict(_own(record, self._recipe) or {"ifd": self._scores[index], "status": "ok"})
            put(record, {**own, "rank": chosen.rank[index], "selected": True}, self._recipe)
            self._stream.emit(record)


def put(record: Record, entry: Mapping[str, Any], recipe: Recipe) -> None:
    """Add `entry` to `record`: as its ``ifd``, or inside it as ``reverse``. The other direction's score stays."""
    present = record.get("ifd")
    earlier = present if isinstance(present, dict) else {}
    if recipe.reverse:
        record["ifd"] = {**earlier, "reverse": entry}
    else:
        record["ifd"] = {**entry, **({"reverse": earlier["reverse"]} if "reverse" in earlier else {})}


def _own(record: Record, recipe: Recipe) -> Mapping[str, Any] | None:
    entry = record.get("ifd")
    if recipe.reverse and isinstance(entry, Mapping):
        entry = entry.get("reverse")
    return entry if isinstance(entry, Mapping) and "status" in entry else None


def _choose_among_scored(config: Config, recipe: Recipe, records: Iterable[Located], stream: Stream) -> dict[str, Any]:
    """Selection alone: needs no model."""
    kept = _Kept(config, recipe, stream)
    statuses: Counter[str] = Counter()
    stream.progress.start("reading scores", None)
    for located in records:
        carried, score = recorded(located.record, reverse=recipe.reverse, ratio=config.ratio)
        if not carried:
            stream.reject(located, "not scored", detail="the input's first record is; --rescore scores all of them")
            continue
        own = _own(located.record, recipe)
        found = str(own["status"]) if own is not None else "ok"
        status = "no_score" if score is None and found == "ok" else found
        statuses[status] += 1
        kept.add(located.record, score, status)
        stream.progress.advance()
    kept.finish()
    return {"statuses": dict(sorted(statuses.items()))}


@dataclasses.dataclass(frozen=True)
class _Text:
    """What turns records into token sequences: a template, a tokenizer, a recipe."""

    template: Template
    codec: Codec
    recipe: Recipe

    @classmethod
    def of(cls, tokenizer: Any, recipe: Recipe) -> _Text:
        from pomona.methods.ifd_score import passages, templates

        codec = passages.Codec(tokenizer, recipe.bos, renders_bos=recipe.template == "chat")
        return cls(templates.load(recipe.template, tokenizer), codec, recipe)

    def window(self, chunk: Chunk) -> Window:
        """Everything to be computed for the records of `chunk`."""
        from pomona.methods.ifd_score import passages, scoring

        found = [passages.samples(spoken, self.template, self.recipe) for _, spoken in chunk]
        prefix = self.recipe.direct_prefix
        scaffold = self.template.scaffold if prefix is None else prefix
        flat = iter(passages.pairs([one for some in found for one in some], self.codec, scaffold, self.recipe))
        return scoring.window([list(itertools.islice(flat, len(some))) for some in found])


def _score(
    config: Config, recipe: Recipe, settings: Settings, records: Iterable[Located], stream: Stream
) -> dict[str, Any]:
    from pomona.methods.ifd_score import scoring
    from pomona.models.losses import passage_nll

    readable = _readable(records, stream)
    learned: dict[str, Any] = {}
    if config.experience is not None:
        readable, learned = _experienced(config, recipe, settings, readable, stream)
    scorer = _scorer(config, settings)
    runtime = scorer.runtime
    stream.progress.note(f"scoring on {runtime.why}; processes: {runtime.world}, threads in each: {runtime.threads}")
    text = _Text.of(scorer.tokenizer, recipe)
    budget = _budget(config, scorer)
    decides = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in _SELECTION_ONLY}
    decides |= {"sort_window": config.sort_window, "tokens_per_batch": budget, "batch_size": settings.batch_size}
    stream.open_journal({"variant": config.variant, **decides, **scorer.identity})

    def measure(passages: Any) -> list[tuple[float, ...]]:
        return passage_nll(
            scorer, passages, tokens_per_batch=budget, chunk_rows=config.chunk_rows, rows=settings.batch_size
        )

    def entries(work: Window) -> list[dict[str, Any]]:
        sums = scoring.nll_sums(
            work,
            measure,
            tokens_per_batch=budget,
            journal=stream.journal,
            identity=scorer.identity,
            completed=stream.progress.advance,
        )
        return scoring.scores(work, sums, recipe)

    kept = _Kept(config, recipe, stream)
    statuses: Counter[str] = Counter()
    stream.progress.start("scoring", settings.limit)
    with _released(scorer.runtime):
        for chunk, work in _ahead(_chunks(readable, config.sort_window), text.window):
            for (record, _), entry in zip(chunk, entries(work), strict=True):
                statuses[entry["status"]] += 1
                put(record, entry, recipe)
                kept.add(record, entry["ifd"] if entry["status"] == "ok" else None, entry["status"])
            stream.flush()
    if statuses["nonfinite"]:
        if not statuses["ok"] + statuses["over_length"]:
            raise CheckFailed(
                "no record has a finite score", hint="the model's weights are damaged, or overflow: try --dtype float32"
            )
        stream.progress.warn(f"{statuses['nonfinite']} records have no finite score (status nonfinite)")
    kept.finish()
    return {"statuses": dict(sorted(statuses.items())), "model": dict(scorer.identity), **learned}


@contextlib.contextmanager
def _released(runtime: Runtime) -> Iterator[None]:
    """Let the other processes of a launch end when the work ends, or when nobody reads its results any more."""
    try:
        yield
    except BrokenPipeError:
        runtime.close()
        raise
    runtime.close()


def _scorer(config: Config, settings: Settings) -> Scorer:
    """The model that scores: the brief one where there is pre-experience."""
    from pomona.models.loading import load_causal_lm
    from pomona.runtime.device import Runtime

    runtime = Runtime.open(settings.device, settings.dtype, settings.seed)
    if config.experience is not None:
        return load_causal_lm(str(config.experience), runtime)
    return load_causal_lm(
        settings.model, runtime, adapter=config.adapter, gguf_file=config.gguf_file, revision=config.revision
    )


def _base(config: Config, settings: Settings) -> Scorer:
    """The model that pre-experience starts from, in the number format it is trained in."""
    from pomona.models.loading import load_causal_lm
    from pomona.runtime.device import Runtime

    runtime = Runtime.open(settings.device, "float32", settings.seed)
    return load_causal_lm(settings.model, runtime, gguf_file=config.gguf_file, revision=config.revision)


def _experienced(
    config: Config, recipe: Recipe, settings: Settings, readable: Iterator[Read], stream: Stream
) -> tuple[Iterator[Read], dict[str, Any]]:
    """Make sure that the brief model exists; the records again, and what the summary says of it."""
    from pomona.methods.ifd_score import experience

    assert config.experience is not None
    wanted = experience.described(config, recipe, settings)
    entry = experience.finished(config.experience, wanted, overwrite=settings.overwrite)
    if entry is None:
        spool, spoken = stream.spool(), []
        for record, exchange in readable:
            spool.append(record)
            spoken.append(exchange)
        scorer = _base(config, settings)
        text = _Text.of(scorer.tokenizer, recipe)
        entry = experience.make(
            config.experience,
            spoken,
            scorer,
            text.template,
            text.codec,
            config,
            recipe,
            settings,
            stream.progress,
            tokens_per_batch=_budget(config, scorer),
        )
        scorer.runtime.close()
        readable = zip(spool, spoken, strict=True)
    else:
        stream.progress.note(f"using the brief model in {config.experience}")
    return readable, {"experience": {"chosen": len(entry["chosen"]), "losses": entry["losses"]}}


def _budget(config: Config, scorer: Scorer) -> int:
    from pomona.methods.ifd_score import scoring

    runtime = scorer.runtime
    return config.token_budget or scoring.token_budget(runtime.device.type, runtime.dtype.itemsize)


def _plan(
    config: Config, recipe: Recipe, settings: Settings, records: Iterable[Located], stream: Stream
) -> dict[str, Any]:
    """What a run would do: the tokenizer is loaded, the weights are not."""
    from pomona.methods.ifd_score import experience, scoring
    from pomona.models.loading import load_tokenizer
    from pomona.models.losses import batches

    plan: dict[str, Any] = {"model": settings.model or "smollm2", "variant": config.variant}
    name: str | None = settings.model
    if config.experience is not None:
        wanted = experience.described(config, recipe, settings)
        made = experience.finished(config.experience, wanted, overwrite=settings.overwrite)
        plan["experience"] = "make" if made is None else "use"
    text = _Text.of(load_tokenizer(name, gguf_file=config.gguf_file, revision=config.revision), recipe)
    budget = config.token_budget or scoring.token_budget(
        "cpu" if settings.device in ("auto", "cpu") else "cuda", 4 if settings.dtype == "float32" else 2
    )
    statuses: Counter[str] = Counter()
    totals = Counter(sequences=0, tokens=0, batches=0)
    for chunk in _chunks(_readable(records, stream), config.sort_window):
        work = text.window(chunk)
        statuses.update(pairs[-1].status for pairs in work.records)
        lengths = [len(passage.ids) for passage in work.passages]
        totals.update(sequences=len(lengths), tokens=sum(lengths), batches=len(batches(lengths, budget)))
    plan |= {"records": stream.counts.read, "statuses": dict(sorted(statuses.items())), **totals}
    return plan | {"rejected": stream.counts.rejected.total(), "recipe": dataclasses.asdict(recipe)}


def _readable(records: Iterable[Located], stream: Stream) -> Iterator[Read]:
    """Records with their turns; what holds no instruction and answer is rejected."""
    for located in records:
        try:
            spoken = turns(located.record, stream.fields)
        except BadRecord as error:
            stream.reject(located, str(error))
            continue
        yield located.record, spoken


def _chunks(readable: Iterable[Read], largest: int) -> Iterator[Chunk]:
    """Windows of doubling size, so that the first record is out soon and later ones are sorted in good company."""
    source, size = iter(readable), min(_FIRST_WINDOW, largest)
    while chunk := list(itertools.islice(source, size)):
        yield chunk
        size = min(2 * size, largest)


def _ahead(chunks: Iterator[Chunk], prepare: Callable[[Chunk], Window]) -> Iterator[tuple[Chunk, Window]]:
    """Each chunk with its window. While one is being scored the next is read and tokenised; only the first is not kept
    waiting for more input to arrive."""
    with ThreadPoolExecutor(1) as tokenising:
        first = next(chunks, None)
        if first is None:
            return
        yield first, prepare(first)
        waiting: tuple[Chunk, Future[Window]] | None = None
        for chunk in chunks:
            coming = chunk, tokenising.submit(prepare, chunk)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = coming
        if waiting is not None:
            yield waiting[0], waiting[1].result()
