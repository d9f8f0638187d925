"""G: what a judge says of a record. An endpoint's answers, or a local model's."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, OrderedDict, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pomona.errors import UsageError
from pomona.io.conversation import Turn
from pomona.io.journal import Journal, NoJournal
from pomona.methods.alpagasus_filter.parsing import Reader, first_line
from pomona.methods.alpagasus_filter.prompts import Messages, Prompt
from pomona.methods.alpagasus_filter.ratings import Rating
from pomona.models.endpoint import Answer, Failure, Request, Unasked

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pomona.models.chat import ChatClient
    from pomona.models.loading import Scorer

T = TypeVar("T")

SCORE_TOKENS = 8
"""Reply tokens asked for when only the score is wanted: room for `**Accuracy: 4.5/5**`. No stop at a newline, because
a reply that begins with one would be cut to nothing."""
REVIEW_TOKENS = 256
"""The paper's length, explanation included."""

_WINDOW = 4096
# A local judge's records per window and tokens per batch. A window is what a killed run may have to repeat, so on a
# processor it is kept to about a minute of a small model.
_ON_CPU = 128, 1024
_ON_ACCELERATOR = 1024, 16384


def reply_tokens(explain: bool) -> int:
    """How many tokens a reply may have."""
    return REVIEW_TOKENS if explain else SCORE_TOKENS


# --- an endpoint -----------------------------------------------------------------------------------------------------


def api_scores(
    records: Iterable[tuple[T, Sequence[Turn]]],
    *,
    client: ChatClient,
    prompt: Prompt,
    reader: Reader,
    max_tokens: int,
    ask_again: bool,
) -> Iterator[tuple[T, Rating]]:
    """A rating for each of `records`, in their order; of records that are shown alike in a window, one is asked.

    `records` is pulled in the caller's thread, a bounded number ahead, so that what it counts or rejects on the way
    happens in one order. The client journals replies, not ratings: another threshold, parser or scale reads them anew
    without a call.

    Args:
        ask_again: put the question once more when no rating can be read from the reply.
    """
    source = iter(records)
    ahead = max(128, 4 * client.endpoint.concurrency)
    questions: SimpleQueue[tuple[tuple[Messages, Rating | None], Request] | None] = SimpleQueue()
    waiting: deque[tuple[T, Messages]] = deque()  # in input order
    waiters: Counter[Messages] = Counter()
    known: OrderedDict[Messages, Rating] = OrderedDict()
    in_flight, exhausted = 0, False
    answers = client.answers(iter(questions.get, None))
    try:
        while True:
            while not exhausted and in_flight < ahead and len(waiting) < _WINDOW:
                following = next(source, None)
                if following is None:
                    exhausted = True
                    break
                messages = prompt.messages(following[1])
                waiting.append((following[0], messages))
                waiters[messages] += 1
                if messages not in known and waiters[messages] == 1:
                    questions.put(((messages, None), Request(messages, max_tokens)))
                    in_flight += 1
            while waiting and waiting[0][1] in known:
                item, messages = waiting.popleft()
                waiters[messages] -= 1
                yield item, known[messages]
                if not waiters[messages]:
                    del waiters[messages]
            while len(known) > _WINDOW and next(iter(known)) not in waiters:
                known.popitem(last=False)
            if in_flight:
                (messages, first), outcome = next(answers)
                in_flight -= 1
                rating = _heard(outcome, reader)
                if first is not None:
                    rating = _sum(first, rating)
                elif ask_again and rating.status == "unparsed":
                    again = Request(prompt.again(messages, rating.detail or ""), max_tokens)
                    questions.put(((messages, rating), again))
                    in_flight += 1
                    continue
                known[messages] = rating
            elif exhausted and not waiting:
                return
    finally:
        questions.put(None)
        if isinstance(answers, Generator):
            answers.close()


def _heard(outcome: Answer | Failure | Unasked, reader: Reader) -> Rating:
    if isinstance(outcome, Unasked):
        return Rating(None, "unasked", detail=outcome.reason)
    if not isinstance(outcome, Answer):
        return Rating(None, "unanswered", detail=outcome.reason)
    score = reader.reply(outcome.text, cut=outcome.finish_reason == "length")
    return Rating(
        score,
        "unparsed" if score is None else "ok",
        outcome.model,
        first_line(outcome.text),
        outcome.prompt_tokens,
        outcome.completion_tokens,
        outcome.text if score is None else None,
    )


def _sum(first: Rating, second: Rating) -> Rating:
    """The second reply, with the tokens of both; the first where there is no second."""
    if second.prompt_tokens is None or first.prompt_tokens is None:
        return first if second.status != "unasked" else second
    return Rating(
        second.score,
        second.status,
        second.model,
        second.first_line,
        first.prompt_tokens + second.prompt_tokens,
        (first.completion_tokens or 0) + (second.completion_tokens or 0),
        second.detail,
    )


# --- a local model ---------------------------------------------------------------------------------------------------


def local_scores(
    records: Iterable[tuple[T, Sequence[Turn]]],
    *,
    scorer: Scorer,
    prompt: Prompt,
    reader: Reader,
    score: Literal["greedy", "expected"],
    max_tokens: int,
    batch_size: int | None,
    journal: Journal | NoJournal,
) -> Iterator[tuple[T, Rating]]:
    """A rating for each of `records` from a local model, in their order, in windows of fixed size.

    A window of which anything is missing in the journal is computed whole, so that batches, and with them the last
    bits of a score, do not depend on where an earlier run stopped.

    Args:
        batch_size: most prompts in one batch; None leaves it to the token budget.

    Raises:
        UsageError: `expected` on a scale whose points the tokenizer does not tell apart by one token.
    """
    judge = _LocalJudge(scorer, reader, score, max_tokens, batch_size)
    remaining = iter(records)
    while window := list(itertools.islice(remaining, judge.window)):
        questions = [judge.question(prompt.messages(turns)) for _, turns in window]
        keys = [judge.key(ids) for ids in questions]
        unique = dict(zip(keys, questions, strict=True))
        found = {key: journal.get(key) for key in unique}
        if any(value is None for value in found.values()):
            for key, answer in zip(unique, judge.answers(list(unique.values())), strict=True):
                if found[key] is None:
                    found[key] = answer
                    journal.append(key, answer)
        for (item, _), key in zip(window, keys, strict=True):
            value = found[key]
            assert value is not None
            yield item, judge.rating(value)


class _LocalJudge:
    """One model and one way of asking it."""

    def __init__(
        self,
        scorer: Scorer,
        reader: Reader,
        score: Literal["greedy", "expected"],
        max_tokens: int,
        batch_size: int | None,
    ) -> None:
        self._scorer = scorer
        self._reader = reader
        self._max_tokens = max_tokens
        self._batch_size = batch_size
        on_cpu = scorer.runtime.device.type == "cpu"
        self.window, self._budget = _ON_CPU if on_cpu else _ON_ACCELERATOR
        self._name = scorer.identity["model"]
        self._prefix: tuple[int, ...] = ()
        self._candidates: list[int] = []
        self._points: list[int] = []
        if score == "expected":
            self._points = whole_points(reader.low, reader.high)
            encoded = [tuple(_encode(scorer.tokenizer, str(point))) for point in self._points]
            self._prefix, self._candidates = label_tokens(encoded)
        asked = {"model": scorer.identity, "score": score, "points": self._points, "max_tokens": max_tokens}
        self._digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
        longest = getattr(scorer.model.config, "max_position_embeddings", None)
        self._room = None if longest is None else longest - (0 if self._points else max_tokens)

    def question(self, messages: Messages) -> tuple[int, ...]:
        return (*chat_ids(self._scorer.tokenizer, messages), *self._prefix)

    def key(self, ids: Sequence[int]) -> str:
        digest = self._digest.copy()
        digest.update(json.dumps(list(ids)).encode())
        return digest.hexdigest()

    def answers(self, questions: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
        """A journal value per question: what the model said, not yet read."""
        fitting = [i for i, ids in enumerate(questions) if self._room is None or len(ids) <= self._room]
        said = self._expected if self._points else self._greedy
        values: list[dict[str, Any]] = [{"failure": "prompt longer than the model's context"} for _ in questions]
        for i, value in zip(fitting, said([questions[i] for i in fitting]) if fitting else [], strict=True):
            values[i] = {**value, "prompt_tokens": len(questions[i])}
        return values

    def _expected(self, questions: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
        import numpy as np

        from pomona.models.losses import next_token_logprobs

        logprobs = next_token_logprobs(
            self._scorer, questions, self._candidates, tokens_per_batch=self._budget, rows=self._batch_size
        )
        scores = expected_score(logprobs, self._points)
        return [{"score": round(float(s), 4) if np.isfinite(s) else None, "tokens": 0} for s in scores]

    def _greedy(self, questions: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
        said = self._scorer.generate(questions, self._max_tokens, tokens_per_batch=self._budget, rows=self._batch_size)
        return [{"text": text, "tokens": tokens} for text, tokens in said]

    def rating(self, value: dict[str, Any]) -> Rating:
        if "failure" in value:
            return Rating(None, "too long", self._name, detail=value["failure"])
        text = value.get("text")
        if text is None:
            score = value["score"]
            line, detail = None, "the model's probabilities are not finite"
        else:
            score = self._reader.reply(text, cut=value["tokens"] >= self._max_tokens)
            line, detail = first_line(text), text
        status: Literal["ok", "unparsed"] = "unparsed" if score is None else "ok"
        return Rating(
            score, status, self._name, line, value["prompt_tokens"], value["tokens"], detail if score is None else None
        )


def whole_points(low: float, high: float) -> list[int]:
    """The scale's whole points, its labels for an expected score (UsageError if there are fewer than two)."""
    points = [point for point in range(int(low) - 1, int(high) + 2) if low <= point <= high]
    if len(points) < 2:
        raise UsageError(f"--score expected needs two whole points on the scale, not {low:g}:{high:g}")
    return points


def expected_score(logprobs: NDArray[Any], points: Sequence[int]) -> NDArray[Any]:
    """sum_s p(s)*s with p renormalised over the points.

    Args:
        logprobs: [n, k] log-probabilities of the points' tokens.
        points: the k whole points.

    Returns:
        [n] scores in [min(points), max(points)], float64.
    """
    import numpy as np

    p = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    expected: NDArray[Any] = (p @ np.asarray(points, dtype=np.float64)) / p.sum(axis=1)
    return expected


def label_tokens(encoded: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], list[int]]:
    """What all encoded labels begin with, to go to the prompt's end, and the one token after it that tells each apart.

    Raises:
        UsageError: two labels share that token, or a label ends before it.
    """
    shared = 0
    while all(len(ids) > shared for ids in encoded) and len({ids[shared] for ids in encoded}) == 1:
        shared += 1
    if any(len(ids) <= shared for ids in encoded) or len({ids[shared] for ids in encoded}) < len(encoded):
        raise UsageError(
            "--score expected: this tokenizer does not tell the scale's points apart by one token",
            hint="use --score greedy, or a scale of one digit such as 0:5",
        )
    return tuple(encoded[0][:shared]), [ids[shared] for ids in encoded]


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def chat_ids(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of `messages` up to where the answer begins; without a chat template, as plain text."""
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": role, "content": content} for role, content in messages]
        ids: list[int] = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return list(ids)
    text = "\n\n".join(content.strip() for _, content in messages)
    plain: list[int] = tokenizer.encode(f"{text}\n\nRating:")
    return plain
