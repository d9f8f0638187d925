"""From token sequences to scores: paper Eq. 3-5 for a window of records at a time.

Within a window equal sequences are computed once, and an answer's sequence that begins a longer one of the same record
shares its forward pass. Finished groups of sequences are journalled; a group is planned from the window alone, so it is
computed in the same company, to the same bits, whether or not the run was interrupted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from pomona.io.journal import Journal, NoJournal
from pomona.methods.ifd_score.config import Recipe
from pomona.methods.ifd_score.passages import Pair, Status
from pomona.models.losses import Passage

Slot = tuple[int, int]  # which passage of the window, which of its spans
Measure = Callable[[Sequence[Passage]], list[tuple[float, ...]]]  # summed NLL of each span, nats

# Measured on two cores with a 135M model: more is slower. An accelerator is full with 16k tokens.
_TOKENS_PER_BATCH = {("cpu", 4): 256, ("cpu", 2): 512, ("mps", 4): 4096, ("mps", 2): 4096}
_GROUP_BATCHES = 32  # batches per journal entry: work for every thread and process, little to lose


@dataclass(frozen=True, slots=True)
class Window:
    """Records to be scored together. `slots` gives, per record and answer, where its two sums are found."""

    records: list[list[Pair]]
    passages: list[Passage]
    slots: list[list[tuple[Slot | None, Slot | None]]]


def window(records: Sequence[list[Pair]]) -> Window:
    """Collect the distinct passages of `records`."""
    index: dict[Passage, int] = {}
    slots = []
    for pairs in records:
        carried = _carry([pair.conditioned for pair in pairs])
        conditioned = [None if at is None else (index.setdefault(at[0], len(index)), at[1]) for at in carried]
        direct = [None if pair.direct is None else (index.setdefault(pair.direct, len(index)), 0) for pair in pairs]
        slots.append(list(zip(conditioned, direct, strict=True)))
    return Window(list(records), list(index), slots)


def _carry(passages: Sequence[Passage | None]) -> list[tuple[Passage, int] | None]:
    """For each passage of one record the longest one that begins with it, and the span's number there.

    A causal model gives a token the same probability whatever follows it, so one forward serves them all.
    """
    longest: list[Passage] = []
    member: list[int | None] = [None] * len(passages)
    for k in sorted((k for k, p in enumerate(passages) if p is not None), key=lambda k: -_length(passages[k])):
        passage = passages[k]
        assert passage is not None
        host = next((h for h, p in enumerate(longest) if p.ids[: len(passage.ids)] == passage.ids), None)
        member[k] = len(longest) if host is None else host
        if host is None:
            longest.append(passage)
    carriers = [
        Passage(p.ids, tuple(sorted({q.spans[0] for q, m in zip(passages, member, strict=True) if q and m == h})))
        for h, p in enumerate(longest)
    ]
    return [
        None if passage is None or h is None else (carriers[h], carriers[h].spans.index(passage.spans[0]))
        for passage, h in zip(passages, member, strict=True)
    ]


def _length(passage: Passage | None) -> int:
    return 0 if passage is None else len(passage.ids)


def token_budget(device: str, itemsize: int) -> int:
    """Tokens in one forward pass that serve a device ("cpu", "cuda", "mps") well, computing in `itemsize` bytes."""
    return _TOKENS_PER_BATCH.get((device, itemsize), 16384)


def groups(passages: Sequence[Passage], tokens: int) -> list[list[int]]:
    """Indices of `passages` by length, split wherever `tokens` tokens have come together."""
    found: list[list[int]] = []
    filled = tokens
    for index in sorted(range(len(passages)), key=lambda i: (len(passages[i].ids), i)):
        if filled + len(passages[index].ids) > tokens:
            found.append([])
            filled = 0
        found[-1].append(index)
        filled += len(passages[index].ids)
    return found


def digest(passages: Sequence[Passage], identity: Mapping[str, Any]) -> str:
    """The journal key of a group: what is computed, and by what."""
    sha = hashlib.sha256(orjson.dumps(dict(identity), option=orjson.OPT_SORT_KEYS))
    for passage in passages:
        sha.update(np.array([len(passage.ids), len(passage.spans), *passage.ids], dtype="<i8").tobytes())
        sha.update(np.array(passage.spans, dtype="<i8").tobytes())
    return sha.hexdigest()


def nll_sums(
    work: Window,
    measure: Measure,
    *,
    tokens_per_batch: int,
    journal: Journal | NoJournal,
    identity: Mapping[str, Any],
    completed: Callable[[int], None],
) -> list[tuple[float, ...]]:
    """Summed NLL of the spans of every passage, group by group; nan where it is not finite.

    Args:
        identity: what computes them, part of a journal entry's key.
        completed: told how many records have all their sums since it was told last.
    """
    sums: list[tuple[float, ...]] = [()] * len(work.passages)
    needed = [{slot[0] for both in slots for slot in both if slot is not None} for slots in work.slots]
    open_passages = [len(passages) for passages in needed]
    users: dict[int, list[int]] = {}
    for record, passages in enumerate(needed):
        for passage in passages:
            users.setdefault(passage, []).append(record)
    completed(open_passages.count(0))
    for group in groups(work.passages, _GROUP_BATCHES * tokens_per_batch):
        members = [work.passages[i] for i in group]
        key = digest(members, identity)
        stored = journal.get(key)
        if stored is None:
            values = measure(members)
            # JSON has no NaN: null stands for it.
            journal.append(key, {"nll": [[v if math.isfinite(v) else None for v in spans] for spans in values]})
        else:
            values = [tuple(math.nan if v is None else v for v in spans) for spans in stored["nll"]]
        done = 0
        for index, value in zip(group, values, strict=True):
            sums[index] = value
            for record in users[index]:
                open_passages[record] -= 1
                done += open_passages[record] == 0
        completed(done)
    return sums


def scores(work: Window, sums: Sequence[tuple[float, ...]], recipe: Recipe) -> list[dict[str, Any]]:
    """The ``ifd`` object of every record in the window."""

    def total(slot: Slot | None) -> float | None:
        return None if slot is None else sums[slot[0]][slot[1]]

    found = []
    for pairs, slots in zip(work.records, work.slots, strict=True):
        answers = [score(pair, total(c), total(d), recipe) for pair, (c, d) in zip(pairs, slots, strict=True)]
        found.append(record_score(answers, recipe))
    return found


def score(pair: Pair, sum_conditioned: float | None, sum_direct: float | None, recipe: Recipe) -> dict[str, Any]:
    """IFD of one answer from its two summed NLLs (nats), Eq. 3-5."""
    n_answer, n_direct = _scored(pair.conditioned), _scored(pair.direct)
    loss_conditioned = _finite(sum_conditioned / n_answer) if sum_conditioned is not None else None
    loss_direct = _finite(sum_direct / n_direct) if sum_direct is not None else None
    ifd_loss = ifd_ppl = None
    if loss_conditioned is not None and loss_direct is not None:
        ifd_loss, ifd_ppl = loss_ratio(loss_conditioned, loss_direct), ppl_ratio(loss_conditioned, loss_direct)
    ifd = ifd_loss if recipe.ratio == "loss" else ifd_ppl
    both = pair.conditioned is not None and pair.direct is not None
    status: Status = "nonfinite" if both and ifd is None else pair.status
    return {
        "ifd": _rounded(ifd),
        "ifd_loss": _rounded(ifd_loss),
        "ifd_ppl": _rounded(ifd_ppl),
        "loss_cond": _rounded(loss_conditioned),
        "loss_direct": _rounded(loss_direct),
        "n_answer": n_answer,
        "n_direct": n_direct,
        "n_prompt": pair.n_prompt,
        "truncated": pair.truncated,
        "boundary_shift": pair.boundary_shift,
        "status": status,
    }


def loss_ratio(conditioned: float, direct: float) -> float | None:
    """s(A|Q) / s(A), Eq. 5; None where it is no finite number."""
    return _finite(conditioned / direct) if direct else None


def ppl_ratio(conditioned: float, direct: float) -> float | None:
    """exp(s(A|Q)) / exp(s(A)), the later papers' ratio; None where it is no finite number."""
    try:
        return math.exp(conditioned - direct)
    except OverflowError:
        return None


def record_score(answers: Sequence[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """One object for the record: the last answer's, or the mean over the answers that have a score."""
    if recipe.turns == "last":
        return answers[-1]
    if recipe.turns == "each":
        return {**answers[-1], "ifd_turns": list(answers)}
    scored = [answer for answer in answers if answer["status"] == "ok"]
    if not scored:
        return answers[-1]
    means = {}
    for name in ("ifd", "ifd_loss", "ifd_ppl", "loss_cond", "loss_direct"):
        values = [answer[name] for answer in scored if answer[name] is not None]
        means[name] = _rounded(math.fsum(values) / len(values)) if values else None
    counts = {name: sum(answer[name] for answer in scored) for name in ("n_answer", "n_direct", "n_prompt")}
    flags = {name: any(answer[name] for answer in answers) for name in ("truncated", "boundary_shift")}
    return {**means, **counts, **flags, "status": "ok"}


def _scored(passage: Passage | None) -> int:
    return 0 if passage is None else passage.spans[0][1] - passage.spans[0][0]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rounded(value: float | None) -> float | None:
    """Eight significant digits: more than float32 sums can carry, few enough to read."""
    return None if value is None else float(f"{value:.8g}")
