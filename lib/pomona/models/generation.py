"""Text from a causal language model, in batches: greedy or sampled, one loop for every caller.

Prompts that begin alike share the computation of their beginning, and equal ones all of it. A batch is padded on the
left, read once, and continued token by token with the keys and values of what was read; rows that are done leave it.
What a row draws comes from a stream of its own, so neither its neighbours nor the size of the batch have a say in it.
Penalties and filters that a model's generation config may name are not applied: temperature and top-p are all there is.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from pomona.errors import CheckFailed
from pomona.models import losses
from pomona.models.losses import Passage
from pomona.runtime.device import Runtime

if TYPE_CHECKING:
    from pomona.models.loading import Scorer

Caching = Literal["shared", "own", "none"]
"""What a model remembers of what it read: keys and values that a common head is shared by; its own kind of cache, each
row alone; nothing, so that everything is read anew for every token."""

_ROOM = 64  # tokens; how far a buffer of keys and values grows at a time
_RANKED = 256  # tokens; seldom do more share the top-p mass, and to rank them all takes as long as a forward pass
_STAY = 0.75  # of a batch; with no more than this share of its rows left, the others leave


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one row continues, and how.

    Attributes:
        ids: one token at least.
        room: most tokens to generate, 1 at least.
        temperature: 0 takes the most probable token.
        top_p: the most probable tokens that together have this probability are drawn from, ties with the last included.
        seed: of the row's random numbers.
    """

    ids: tuple[int, ...]
    room: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Continuation:
    """Generated tokens, the one that ended them included, and why there are no more."""

    ids: tuple[int, ...]
    finish: Literal["stop", "length", "not finite"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Places of prompts that are computed together; the first `head` tokens of all of them agree and are shared."""

    places: tuple[int, ...]
    head: int


def plan(
    scorer: Scorer, prompts: Sequence[Prompt], *, tokens_per_batch: int, rows: int | None, foreseen: int
) -> list[Batch]:
    """Batches of at most `tokens_per_batch` tokens, of prompts and at most `foreseen` new ones each, padding counted.

    The plan depends on the prompts alone.
    """
    # One token of each prompt must be left to predict the next from.
    passages = [Passage(p.ids, ((len(p.ids), len(p.ids) + 1),)) for p in prompts]
    lengths = [len(p.ids) + min(p.room, foreseen) for p in prompts]
    shared = losses.heads(passages) if scorer.caching == "shared" else [0] * len(prompts)
    planned = losses.plan(passages, shared, lengths, tokens_per_batch, rows)
    return [Batch(tuple(batch), shared[batch[0]]) for batch in planned]


def generate(scorer: Scorer, prompts: Sequence[Prompt], batches: Sequence[Batch]) -> list[list[Continuation]]:
    """The continuations of the prompts of each batch, in the order of its places.

    A batch that does not fit into memory is halved and tried again.

    Raises:
        CheckFailed: a row's logits are not finite.
        UnavailableError: a single sequence does not fit into memory.
    """
    items = [([prompts[i] for i in batch.places], batch.head, scorer.caching) for batch in batches]
    found: list[list[Continuation]] = scorer.runtime.map("generate", items)
    # Not raised where it is seen: a process that fails alone would leave the others waiting.
    if any(row.finish == "not finite" for rows in found for row in rows):
        raise CheckFailed(
            "the model's logits are not finite",
            hint="are its weights damaged? float16 overflows with some models; try --dtype bfloat16 or float32",
        )
    return found


def register(runtime: Runtime, model: Any) -> None:
    """Make `model` known to every process of `runtime` under the name that this module maps over."""
    heads = losses.Heads(model)
    runtime.register(
        "generate",
        lambda item: losses.halving(
            lambda part: _generate(model, part, heads, item[1], item[2]), item[0], hint="fewer new tokens need less"
        ),
    )


# --- one batch -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _generate(
    model: Any, prompts: Sequence[Prompt], heads: losses.Heads, head: int, cache: Caching
) -> list[Continuation]:
    device, count = model.device, len(prompts)
    ends = torch.tensor(_ends(model), dtype=torch.long, device=device)
    room = torch.tensor([p.room for p in prompts], device=device)
    longest = max(p.room for p in prompts)
    draws = _Draws(prompts, device) if any(p.temperature > 0 for p in prompts) else None
    said = torch.zeros(count, longest, dtype=torch.long, device=device)
    length = torch.zeros(count, dtype=torch.long, device=device)
    broken = torch.zeros(count, dtype=torch.bool, device=device)
    rows = torch.arange(count, device=device)  # those in the batch
    done = torch.zeros(count, dtype=torch.bool, device=device)  # of those in the batch
    reading = _Recomputed(model, prompts) if cache == "none" else _Cached(model, prompts, heads, head, cache)
    logits = reading.logits
    for step in range(longest):
        sound = logits.sum(dim=-1).isfinite()  # no finite logits add up to more than float32 holds
        tokens = logits.argmax(dim=-1)
        if draws is not None:
            tokens = torch.where(draws.hot, draws.tokens(logits, step), tokens)
        tokens = torch.where(sound, tokens, 0)  # a row without numbers must not look up a token that is not there
        said[rows, step] = tokens
        length[rows] += ~done
        broken[rows] |= ~sound & ~done
        done = done | ~sound | torch.isin(tokens, ends) | (length[rows] >= room[rows])
        staying = len(rows) - int(done.sum())  # the step's one transfer
        if not staying:
            break
        if staying <= _STAY * len(rows):
            left = (~done).nonzero().squeeze(-1)
            rows, tokens, done = rows[left], tokens[left], done[left]
            reading.keep(left)
            if draws is not None:
                draws.keep(left)
        logits = reading.read(tokens, done)
    stops = set(ends.tolist())
    found = []
    for ids, taken, bad in zip(said.tolist(), length.tolist(), broken.tolist(), strict=True):
        finish: Literal["stop", "length"] = "stop" if ids[taken - 1] in stops else "length"
        found.append(Continuation(tuple(ids[:taken]), "not finite" if bad else finish))
    return found


def _ends(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


class _Draws:
    """How each row of a batch is drawn, and its uniform random numbers, one for each token."""

    def __init__(self, prompts: Sequence[Prompt], device: torch.device) -> None:
        longest = max(p.room for p in prompts)
        uniform = []
        for prompt in prompts:
            stream = random.Random(prompt.seed)  # the same numbers in every version and on every machine
            uniform.append([stream.getrandbits(32) / 2**32 for _ in range(longest if prompt.temperature > 0 else 0)])
        self._uniform = torch.tensor([row or [0.0] * longest for row in uniform], dtype=torch.float64)
        self.hot = torch.tensor([p.temperature > 0 for p in prompts], device=device)
        self._temperature = torch.tensor([p.temperature or 1.0 for p in prompts], device=device)
        self._top_p = torch.tensor([p.top_p for p in prompts], device=device)
        self._narrow = any(p.top_p < 1 for p in prompts)
        if device.type != "mps":  # which has no float64
            self._uniform = self._uniform.to(device)

    def tokens(self, logits: Tensor, step: int) -> Tensor:
        """A token for each row, int64, shape [rows]."""
        return draw(logits, self._temperature, self._top_p if self._narrow else None, self._uniform[:, step])

    def keep(self, rows: Tensor) -> None:
        self.hot, self._temperature, self._top_p = self.hot[rows], self._temperature[rows], self._top_p[rows]
        self._uniform = self._uniform[rows.to(self._uniform.device)]


def draw(logits: Tensor, temperature: Tensor, top_p: Tensor | None, uniform: Tensor) -> Tensor:
    """Tokens drawn from softmax(logits / temperature), of the most probable ones with `top_p` of the mass alone.

    By inversion: the first token at which the cumulative probability exceeds `uniform` of the whole.

    Args:
        logits: [rows, vocabulary], float32.
        temperature: [rows], above 0.
        top_p: [rows]; None means all of it.
        uniform: [rows] in [0, 1 - 2^-32], float64.

    Returns:
        [rows] token ids, int64.
    """
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]
    p = torch.softmax(scaled, dim=-1)
    if top_p is not None:
        ranked = p.topk(min(_RANKED, p.shape[-1]), dim=-1).values
        if bool((ranked.sum(dim=-1) < top_p).any()):
            ranked = p.sort(dim=-1, descending=True).values
        before = ranked.cumsum(dim=-1) - ranked
        needed = (before < top_p[:, None]).sum(dim=-1, keepdim=True).clamp(min=1)
        least = ranked.gather(-1, needed - 1).where(top_p[:, None] < 1, 0.0)  # at 1 rounding must cut nothing off
        p = p.where(p >= least, 0.0)
    cumulative = p.to(uniform.device).double().cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).to(logits.device)


# --- what was read ---------------------------------------------------------------------------------------------------


class _Cached:
    """The rows of a batch, read up to their last token, and the keys and values of what was read.

    Attributes:
        logits: of each row's first new token, float32, shape [rows, vocabulary].
    """

    def __init__(self, model: Any, prompts: Sequence[Prompt], heads: losses.Heads, head: int, cache: Caching) -> None:
        self._model = model
        self._takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
        device = model.device
        places: dict[tuple[int, ...], int] = {}
        twins = torch.tensor([places.setdefault(p.ids[head:], len(places)) for p in prompts], device=device)
        tails = list(places)
        width = max(map(len, tails))
        pads = torch.tensor([width - len(tail) for tail in tails], device=device)
        ids = torch.tensor([[*[0] * (width - len(tail)), *tail] for tail in tails], device=device)
        self._read = head + width
        if cache == "shared":
            room = self._read + min(_ROOM, max(p.room for p in prompts))
            self._cache: Any = Cache(layer_class_to_replicate=lambda: _Buffer(room))
            if head:
                for number, layer in enumerate(heads.of(prompts[0].ids[:head]).layers):
                    keys, values = (t.expand(len(tails), -1, -1, -1) for t in (layer.keys, layer.values))
                    self._cache.update(keys, values, number)
        else:
            self._cache = DynamicCache(config=model.config)
        self._mask: Tensor | None = None
        if any(len(tail) < width for tail in tails):
            self._mask = torch.ones(
                len(tails), self._read + max(p.room for p in prompts), dtype=torch.long, device=device
            )
            self._mask[:, head : self._read] = torch.arange(width, device=device) >= pads[:, None]
        positions = head + (torch.arange(width, device=device) - pads[:, None]).clamp(min=0)
        self.logits = self._forward(ids, positions)
        self._position = positions[:, -1]
        if len(tails) < len(prompts):
            self.keep(twins)
            self.logits = self.logits[twins]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        more = {"position_ids": positions} if self._takes_positions else {}
        mask = None if self._mask is None else self._mask[:, : self._read]
        hidden = self._model.base_model(
            input_ids=ids, attention_mask=mask, past_key_values=self._cache, use_cache=True, **more
        ).last_hidden_state
        return losses.logits(self._model, hidden[:, -1])

    def read(self, tokens: Tensor, done: Tensor) -> Tensor:
        """Append a token to each row; returns the logits of the next. A row that is done stands still, so that it does
        not run out of positions."""
        self._read += 1
        self._position = self._position + ~done
        return self._forward(tokens[:, None], self._position[:, None])

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self._cache.reorder_cache(rows)
        self._position = self._position[rows]
        if self._mask is not None:
            self._mask = self._mask[rows]


class _Recomputed:
    """The same for models that remember nothing we know how to use: rows are padded on the right and read anew."""

    def __init__(self, model: Any, prompts: Sequence[Prompt]) -> None:
        self._model = model
        self._length = torch.tensor([len(p.ids) for p in prompts], device=model.device)
        width = max(len(p.ids) + p.room for p in prompts) + 1
        self._ids = torch.tensor([[*p.ids, *[0] * (width - len(p.ids))] for p in prompts], device=model.device)
        self._rows = torch.arange(len(prompts), device=model.device)
        self._width = max(len(p.ids) for p in prompts)
        self.logits = self._forward()

    def _forward(self) -> Tensor:
        hidden = losses.body(self._model, self._ids[:, : self._width])
        return losses.logits(self._model, hidden[self._rows, self._length - 1])

    def read(self, tokens: Tensor, done: Tensor) -> Tensor:
        self._ids[self._rows, self._length] = tokens  # behind the last of a row that is done, where nobody looks
        self._length = self._length + ~done
        self._width += 1
        return self._forward()

    def keep(self, rows: Tensor) -> None:
        self._ids, self._length = self._ids[rows], self._length[rows]
        self._rows = torch.arange(len(rows), device=rows.device)


class _Buffer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer with room for those to come: a `DynamicLayer` copies all of them for every token."""

    keys: Tensor
    values: Tensor

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._held: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._held = [t.new_empty(*t.shape[:2], self._room, t.shape[3]) for t in (key_states, value_states)]
        used = self.get_seq_length()
        end = used + key_states.shape[-2]
        if end > self._held[0].shape[2]:
            self._move([self.keys, self.values], end + _ROOM)
        for held, states in zip(self._held, (key_states, value_states), strict=True):
            held[:, :, used:end] = states
        self.keys, self.values = (held[:, :, :end] for held in self._held)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        room = self._held[0].shape[2]
        self._move([t.index_select(0, beam_idx) for t in (self.keys, self.values)], room)

    def _move(self, states: list[Tensor], room: int) -> None:
        used = states[0].shape[2]
        self._held = [t.new_empty(*t.shape[:2], room, t.shape[3]) for t in states]
        for held, old in zip(self._held, states, strict=True):
            held[:, :, :used] = old
        self.keys, self.values = (held[:, :, :used] for held in self._held)


# --- what a model can do ---------------------------------------------------------------------------------------------


def caching(model: Any, *, shares_heads: bool) -> Caching:
    """The best of what `model` remembers that leaves its logits as they are without it.

    Tried out on a few tokens, as no list of architectures is complete: some count positions over padding, or measure
    distances across the gap between a shared head and a padded tail.
    """
    if "past_key_values" in inspect.signature(model.base_model.forward).parameters:
        if shares_heads and _faithful(model, "shared"):
            return "shared"
        if _faithful(model, "own"):
            return "own"
    return "none"


@torch.inference_mode()
def _faithful(model: Any, cache: Caching) -> bool:
    vocabulary = model.config.get_text_config().vocab_size
    tokens = [(7 * i * i + 5 * i + 3) % vocabulary for i in range(40)]
    head = 8 if cache == "shared" else 0
    said = tokens[-3:]
    prompts = [Prompt(tuple(tokens[:37]), 4), Prompt((*tokens[:8], *tokens[20:25]), 4)]
    reading = _Cached(model, prompts, losses.Heads(model), head, cache)
    found = [reading.logits]
    nobody = torch.zeros(2, dtype=torch.bool, device=model.device)
    for token in said:
        found.append(reading.read(torch.full((2,), token, device=model.device), nobody))
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([[*prompt.ids, *said]], device=model.device)
        whole = losses.logits(model, losses.body(model, ids)[0, -4:])
        if not losses.alike(whole, torch.stack([step[row] for step in found]), model.dtype):
            return False
    return True
