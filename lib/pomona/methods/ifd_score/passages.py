"""Which tokens count: a prompt and an answer become two token sequences with the answer's span in each.

The conditioned sequence is Q followed by A, the direct one A after a short scaffold or after nothing (paper Eq. 3-4).
Token positions follow the reference scripts exactly where `--boundary text` is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pomona.io.conversation import Turn
from pomona.methods.ifd_score.config import Bos, Recipe
from pomona.methods.ifd_score.templates import Template, reversed_turn
from pomona.models.losses import Passage

Status = Literal["ok", "empty_answer", "prompt_too_long", "no_context_token", "over_length", "nonfinite"]
Ids = tuple[int, ...]

# Room that the reference leaves for the direct pass beyond L - P. Right for LLaMA's tokenizer (4 and 6 are its counts
# with the start token), and kept as it is for any other, because it decides where an over-long answer is cut.
_DIRECT_ROOM = {"### Response:": 4, "ASSISTANT:": 6, "": 1}


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer to be scored, and the text it answers."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Pair:
    """The two passes of one sample. A pass is None when it has nothing to score.

    `n_prompt` is P: tokens of the prompt, with the start token, at most the maximal length. `truncated`: part of the
    answer lies beyond the maximal length. `boundary_shift`: the tokens of prompt + answer do not start with those of
    the prompt, so the span starts a little off.
    """

    conditioned: Passage | None
    direct: Passage | None
    n_prompt: int
    truncated: bool = False
    boundary_shift: bool = False
    status: Status = "ok"


def samples(turns: Sequence[Turn], template: Template, recipe: Recipe) -> list[Sample]:
    """What is scored of a record: its last answer, or all of them, each in the context of everything before it."""
    first = len(turns) - 1 if recipe.turns == "last" else 0
    if recipe.reverse:
        asked = [reversed_turn(turn) for turn in turns[first:]]
        return [Sample(template.prompt([turn]), turn.output) for turn in asked]
    return [Sample(template.prompt(turns[: k + 1]), turns[k].output) for k in range(first, len(turns))]


class Codec:
    """A tokenizer with the recipe's ideas about start and end tokens."""

    def __init__(self, tokenizer: Any, bos: Bos, *, renders_bos: bool) -> None:
        """
        Args:
            renders_bos: texts may start with the start token already (chat templates write it themselves).
        """
        self._tokenizer = tokenizer
        self._renders_bos = renders_bos
        self.eos: int | None = tokenizer.eos_token_id
        self.lead = self._lead(bos)

    def _lead(self, bos: Bos) -> Ids:
        if bos == "none":
            return ()
        marked, plain = (self._tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
        own: list[int] = next((marked[:n] for n in range(len(marked)) if marked[n : n + len(plain)] == plain), [])
        if own or bos == "auto":
            return tuple(own)
        token = self._tokenizer.bos_token_id if self._tokenizer.bos_token_id is not None else self.eos
        return () if token is None else (token,)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text, start token included."""
        return [self._led(ids) for ids in self.continuations(texts)]

    def continuations(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text, nothing added."""
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [tuple(ids) for ids in encoded["input_ids"]]

    def _led(self, ids: Ids) -> Ids:
        return ids if self._renders_bos and ids[: len(self.lead)] == self.lead else self.lead + ids


def pairs(found: Sequence[Sample], codec: Codec, scaffold: str, recipe: Recipe) -> list[Pair]:
    """The token sequences of every sample; all texts are tokenised in one call each."""
    prompts = codec.encode([sample.prompt for sample in found])
    start_direct = codec.encode([scaffold])[0]
    if recipe.boundary == "text":
        wholes = codec.encode([sample.prompt + sample.answer for sample in found])
        directs = codec.encode([scaffold + sample.answer for sample in found])
    else:
        answers = codec.continuations([sample.answer for sample in found])
        wholes = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        directs = [start_direct + answer for answer in answers]
    room = _DIRECT_ROOM.get(scaffold, len(start_direct))
    end = (codec.eos,) if recipe.eos == "score" and codec.eos is not None else ()
    return [
        _pair(prompt, whole + end, direct + end, len(start_direct), room, recipe)
        if sample.answer
        else Pair(None, None, min(len(prompt), recipe.max_length), status="empty_answer")
        for sample, prompt, whole, direct in zip(found, prompts, wholes, directs, strict=True)
    ]


def _pair(prompt: Ids, whole: Ids, direct: Ids, scaffold_tokens: int, room: int, recipe: Recipe) -> Pair:
    """Cut both sequences and find the answer in them; P, k and L as in the reference."""
    length, start = recipe.max_length, len(prompt)
    limit = length - start + room
    cut = len(whole) > length or len(direct) > limit
    whole_cut, direct_cut = whole[:length], direct[: max(limit, 0)]
    pair = Pair(None, None, min(start, length), cut, whole[:start] != prompt)
    if start >= length:
        return replace(pair, status="prompt_too_long")
    answer_direct = len(direct_cut) - scaffold_tokens
    if len(whole_cut) <= start or answer_direct <= 0:
        return replace(pair, status="empty_answer")
    if cut and recipe.on_truncate == "drop":
        return replace(pair, status="over_length")
    pair = replace(pair, conditioned=_passage(whole_cut, start), direct=_passage(direct_cut, scaffold_tokens))
    if pair.conditioned is None or pair.direct is None:
        return replace(pair, status="no_context_token")
    over = recipe.over_length and start + answer_direct > length
    return replace(pair, status="over_length") if over else pair


def _passage(ids: Ids, start: int) -> Passage | None:
    """Score `ids` from `start` on. The first token of all has nothing before it, so it is never scored."""
    first = max(start, 1)
    return Passage(ids, ((first, len(ids)),)) if first < len(ids) else None
