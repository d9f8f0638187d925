"""Conversations with a local model, in rounds: what all live conversations ask is generated in common batches.

`LocalModel` stands where `ChatClient` stands, without an endpoint. A fixed number of conversations is live at a time;
every round asks all that they ask, so the batches, and with them the last bits of every probability, follow from the
conversations and the settings alone. A batch of which any answer is missing in the journal is computed whole: a run
that was killed ends with the bytes of one that was not.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar

from jinja2 import TemplateError

from pomona.io.journal import Journal, NoJournal
from pomona.models.endpoint import Answer, Chain, Failure, Outcome, Request, request_key
from pomona.models.generation import Batch, Continuation, Prompt, generate, plan
from pomona.runtime.progress import Progress
from pomona.runtime.seeds import derive

if TYPE_CHECKING:
    from pomona.models.loading import Scorer

T = TypeVar("T")
R = TypeVar("R")
Messages = tuple[tuple[str, str], ...]

# Live conversations; most rows and tokens of a batch, and how many of a row's new tokens the plan counts with: most
# replies end long before --max-tokens, and a batch that outgrows the memory is halved. On a processor a row more is
# hardly cheaper beyond 32 rows, and with more than that slower.
_ON_CPU = 256, 32, 16384, 128
_ON_ACCELERATOR = 2048, 256, 32768, 256
_AT_A_TIME = 2  # batches of each thread between two looks at the journal, of which a killed run repeats them all


class LocalModel:
    """Answers requests with a model of this machine.

    A request's `stop` and `schema` are not followed. At temperature 0 requests that differ in `sample` alone are the
    same, and the same requests of a round are computed once. What is drawn depends on the request alone.

    Attributes:
        generated_tokens: new tokens computed by this run.
        prompt_tokens: tokens of the prompts they continue.
        shared_tokens: those of them that were read for another prompt of the batch already.
        seconds: spent on it.
    """

    def __init__(
        self, scorer: Scorer, journal: Journal | NoJournal, *, batch_size: int | None, progress: Progress
    ) -> None:
        self._scorer = scorer
        self._journal = journal
        self._progress = progress
        on_cpu = scorer.runtime.device.type == "cpu"
        self._window, rows, self._tokens_per_batch, self._foreseen = _ON_CPU if on_cpu else _ON_ACCELERATOR
        self._rows = rows if batch_size is None else batch_size
        self._name = scorer.identity["model"]
        self._identity = json.dumps(scorer.identity, sort_keys=True)
        self._context: int | None = getattr(scorer.model.config.get_text_config(), "max_position_embeddings", None)
        self.generated_tokens = self.prompt_tokens = self.shared_tokens = 0
        self.seconds = 0.0

    def conversations(self, chains: Iterable[tuple[T, Chain[R]]]) -> Iterator[tuple[T, R]]:
        """Each item with the result of its chain, as they finish; those that finish in one round in the given order.

        `chains` is pulled as earlier ones finish.

        Raises:
            CheckFailed: the model's logits are not finite.
            UnavailableError: a single prompt does not fit into memory.
        """
        source = iter(chains)
        live: list[tuple[T, Chain[R], Sequence[Request]]] = []
        if self._scorer.caching == "none":
            self._progress.note(f"{self._name} cannot continue what it has read: every token costs a whole pass")
        while True:
            while len(live) < self._window and (following := next(source, None)) is not None:
                item, chain = following
                try:
                    live.append((item, chain, next(chain)))
                except StopIteration as done:
                    yield item, done.value
            if not live:
                break
            outcomes = iter(self._answers([request for _, _, asked in live for request in asked]))
            asking, live = live, []
            for item, chain, asked in asking:
                try:
                    live.append((item, chain, chain.send(list(itertools.islice(outcomes, len(asked))))))
                except StopIteration as done:
                    yield item, done.value
        self._progress.note(
            f"{self.generated_tokens:,} tokens generated in {self.seconds:.1f} s; {self.shared_tokens:,} of "
            f"{self.prompt_tokens:,} prompt tokens were shared"
        )

    def _answers(self, requests: Sequence[Request]) -> list[Outcome]:
        """What comes of each request of a round, in order."""
        same = [_essence(request) for request in requests]
        rendered = {messages: self._ids(messages) for messages in dict.fromkeys(r.messages for r in same)}
        found: dict[Request, Answer | Failure] = {}
        asked: list[Request] = []
        prompts: list[Prompt] = []
        for request in dict.fromkeys(same):
            ids = rendered[request.messages]
            if isinstance(ids, Failure):
                found[request] = ids
                continue
            # The key without the model's name, which may be a path.
            seed = derive(request.seed or 0, request_key("", request)) if request.temperature > 0 else 0
            room = request.max_tokens if self._context is None else min(request.max_tokens, self._context - len(ids))
            asked.append(request)
            prompts.append(Prompt(ids, room, request.temperature, request.top_p, seed))
        found |= self._generated(asked, prompts)
        outcomes: list[Outcome] = []
        told: set[Request] = set()
        for request in same:
            outcome = found[request]
            outcomes.append(
                replace(outcome, cached=True) if isinstance(outcome, Answer) and request in told else outcome
            )
            told.add(request)
        return outcomes

    def _generated(self, requests: Sequence[Request], prompts: Sequence[Prompt]) -> dict[Request, Answer | Failure]:
        planned = plan(
            self._scorer,
            prompts,
            tokens_per_batch=self._tokens_per_batch,
            rows=self._rows,
            foreseen=self._foreseen,
        )
        keys = [request_key(self._identity, request) for request in requests]
        held = [self._journal.get(key) for key in keys]
        lacking = [batch for batch in planned if any(held[i] is None for i in batch.places)]
        found = {
            request: _usable(Answer(**value, cached=True))
            for request, value in zip(requests, held, strict=True)
            if value is not None
        }
        runtime = self._scorer.runtime
        stride = _AT_A_TIME * runtime.threads * runtime.world
        self._progress.start("generating", sum(len(batch.places) for batch in lacking))
        for start in range(0, len(lacking), stride):
            batches = lacking[start : start + stride]
            began = time.monotonic()
            said = generate(self._scorer, prompts, batches)
            self.seconds += time.monotonic() - began
            for batch, rows in zip(batches, said, strict=True):
                self._progress.advance(len(rows))
                self._count(batch, prompts, rows)
                for i, row in zip(batch.places, rows, strict=True):
                    if held[i] is None:
                        answer = self._answer(prompts[i], row)
                        entry = {name: value for name, value in asdict(answer).items() if name != "cached"}
                        self._journal.append(keys[i], entry)
                        found[requests[i]] = _usable(answer)
        return found

    def _answer(self, prompt: Prompt, said: Continuation) -> Answer:
        text = self._scorer.tokenizer.decode(said.ids, skip_special_tokens=True)
        return Answer(text, len(prompt.ids), len(said.ids), said.finish, self._name, cached=False)

    def _count(self, batch: Batch, prompts: Sequence[Prompt], rows: Sequence[Continuation]) -> None:
        asked = [prompts[i].ids for i in batch.places]
        read = batch.head + sum(len(ids) - batch.head for ids in set(asked))
        self.generated_tokens += sum(len(row.ids) for row in rows)
        self.prompt_tokens += sum(map(len, asked))
        self.shared_tokens += sum(map(len, asked)) - read

    def _ids(self, messages: Messages) -> tuple[int, ...] | Failure:
        try:
            ids = chat_ids(self._scorer.tokenizer, messages)
        except TemplateError as error:
            return Failure("chat template refused", 1, str(error))
        except UnicodeEncodeError as error:
            return Failure("not valid Unicode", 1, str(error))
        if self._context is not None and len(ids) > self._context - 1:
            return Failure(
                "context overflow", 1, f"the prompt has {len(ids)} tokens, the model's context {self._context}"
            )
        return ids


def chat_ids(tokenizer: Any, messages: Messages) -> tuple[int, ...]:
    """Token ids of a conversation up to where the answer begins.

    By the tokenizer's chat template; what it does not take as the system's is put before the first message of the user.
    Without a template, "role: content" in paragraphs, and "assistant:" in the last.

    Raises:
        TemplateError: the template refuses the conversation, its roles' order for example.
        UnicodeEncodeError: a message holds a lone surrogate.
    """
    if not getattr(tokenizer, "chat_template", None):
        plain = [f"{role}: {content}" for role, content in messages]
        return _encoded(tokenizer, "\n\n".join([*plain, "assistant:"]), special=True)
    instructions = [content for role, content in messages if role == "system"]
    if not instructions:
        return _templated(tokenizer, messages)[1]
    try:
        text, ids = _templated(tokenizer, messages)
        if all(content.strip() in text for content in instructions):  # some leave them out without a word
            return ids
    except TemplateError:
        pass
    return _templated(tokenizer, _merged(messages))[1]


def _templated(tokenizer: Any, messages: Messages) -> tuple[str, tuple[int, ...]]:
    chat = [{"role": role, "content": content} for role, content in messages]
    text: str = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return text, _encoded(tokenizer, text, special=False)


def _encoded(tokenizer: Any, text: str, *, special: bool) -> tuple[int, ...]:
    text.encode()  # tokenizers have a type error for a lone surrogate
    return tuple(tokenizer.encode(text, add_special_tokens=special))


def _merged(messages: Messages) -> Messages:
    """Without system messages; the first message of the user begins with their text."""
    instructions = [content for role, content in messages if role == "system"]
    others = [message for message in messages if message[0] != "system"]
    first = next((place for place, (role, _) in enumerate(others) if role == "user"), None)
    if first is None:
        return ("user", "\n\n".join(instructions)), *others
    others[first] = "user", "\n\n".join([*instructions, others[first][1]])
    return tuple(others)


def _essence(request: Request) -> Request:
    """The request without what has no say in the answer."""
    request = replace(request, stop=(), schema=None)
    return request if request.temperature > 0 else replace(request, sample=0, seed=None, top_p=1.0)


def _usable(answer: Answer) -> Answer | Failure:
    if answer.text.strip():
        return answer
    said = f"{answer.completion_tokens} tokens, none of them text"
    return Failure("empty answer", 1, said, answer.finish_reason)
