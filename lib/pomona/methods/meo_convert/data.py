"""Texts as a model sees them: token ids, what is to be predicted of each, and batches padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pomona.errors import DataError, UsageError
from pomona.io.labelled import Labelled
from pomona.runtime.seeds import derive

Objective = Literal["classification", "causal", "masked"]

IGNORED = -100
"""The label of a token that is not to be predicted."""
MASKED = 0.15
"""Share of tokens that a masked language model predicts (Devlin et al. 2019): 80 % of them hidden, 10 % random."""


@dataclass(frozen=True)
class Examples:
    """Texts encoded for one objective.

    Attributes:
        inputs: of each text, what its tokenizer gave: ``input_ids``, and ``token_type_ids`` where the model has them.
        special: of each text, which tokens are the tokenizer's own; for masking, else empty.
        labels: of each text, its class; empty for language modelling.
        names: the classes.
        truncated: texts longer than the limit, whose end is not seen.
    """

    inputs: list[dict[str, list[int]]]
    special: list[list[int]]
    labels: list[int]
    names: tuple[str, ...]
    truncated: int

    def __len__(self) -> int:
        return len(self.inputs)

    def length(self, place: int) -> int:
        """Tokens of the text at `place`."""
        return len(self.inputs[place]["input_ids"])


class Batch(NamedTuple):
    """Padded texts: `inputs` are (b, s), `labels` are (b,) classes or (b, s) tokens with `IGNORED` elsewhere."""

    inputs: dict[str, Tensor]
    labels: Tensor

    @property
    def predicted(self) -> int:
        """Classes or tokens that count in the loss."""
        return int((self.labels != IGNORED).sum())


def objective(model: Any, labelled: Labelled) -> Objective:
    """What `model` can learn of `labelled`: classes where there are labels, else the texts' own tokens.

    Raises:
        UsageError: without labels, a model that has no language-modelling head, or encodes one text to decode another.
    """
    if labelled.names:
        return "classification"
    heads = [base.__name__ for base in type(model).__mro__]
    if model.config.is_encoder_decoder:
        raise UsageError(
            "language modelling trains on one text, and this model turns a text into another",
            hint="--label-field trains it as a classifier",
        )
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in heads):
        return "causal"
    if any(name.endswith("ForMaskedLM") for name in heads):
        return "masked"
    raise UsageError(
        f"{model.config.model_type}: this model has no language-modelling head",
        hint="--label-field FIELD trains it as a classifier",
    )


def encode(labelled: Labelled, tokenizer: Any, kind: Objective, max_length: int) -> Examples:
    """Token ids of every text, at most `max_length`; a causal model also learns where a text ends, if that is seen.

    Raises:
        DataError: a text in which there is nothing to predict.
    """
    columns = [list(column) for column in zip(*labelled.texts, strict=True)]
    options: dict[str, Any] = {"return_attention_mask": False, "verbose": False}
    whole = tokenizer(*columns, **options)["input_ids"]
    encoded = tokenizer(*columns, **options, truncation=True, max_length=max_length, return_special_tokens_mask=True)
    special = encoded.pop("special_tokens_mask")
    inputs = [
        {name: list(encoded[name][place]) for name in ("input_ids", "token_type_ids") if name in encoded}
        for place in range(len(labelled.texts))
    ]
    if kind == "causal" and (end := tokenizer.eos_token_id) is not None:
        for entry in inputs:
            if len(entry["input_ids"]) < max_length and entry["input_ids"][-1:] != [end]:
                for name, values in entry.items():
                    values.append(end if name == "input_ids" else values[-1] if values else 0)
    for place, entry in enumerate(inputs):
        _check(place, len(entry["input_ids"]), special[place], kind)
    truncated = sum(len(ids) > max_length for ids in whole)
    return Examples(inputs, special if kind == "masked" else [], labelled.labels, tuple(labelled.names), truncated)


def _check(place: int, length: int, special: Sequence[int], kind: Objective) -> None:
    lacking = length < 1 if kind == "classification" else length < 2 if kind == "causal" else all(special)
    if lacking:
        raise DataError(f"text {place + 1} has {length} token{'s' * (length != 1)}: there is nothing to predict")


def split(labelled: Labelled, seed: int) -> tuple[Labelled, Labelled]:
    """A tenth of the texts, drawn by `seed` and at least one, to measure with, after the rest to train on.

    Raises:
        DataError: there is one text alone.
    """
    count = len(labelled.texts)
    if count < 2:
        raise DataError("one text cannot be both trained on and measured with", hint="give a file with --test")
    random = np.random.Generator(np.random.Philox(derive(seed, "split")))
    held = set(random.permutation(count)[: max(1, count // 10)].tolist())

    def part(places: Sequence[int]) -> Labelled:
        labels = [labelled.labels[place] for place in places] if labelled.labels else []
        return Labelled([labelled.texts[place] for place in places], labels, labelled.names)

    return part([place for place in range(count) if place not in held]), part(sorted(held))


def order(count: int, seed: int, needed: int) -> list[int]:
    """The places of the first `needed` texts to learn from: every text once, in random order, then all over again."""
    random = np.random.Generator(np.random.Philox(derive(seed, "order")))
    places: list[int] = []
    while len(places) < needed:
        places.extend(random.permutation(count).tolist())
    return places[:needed]


@dataclass(frozen=True)
class Collator:
    """Makes batches of examples for one model.

    Attributes:
        padding: the token behind the end of a text; attention does not see it.
        mask: the token that hides another, for masked language modelling.
        vocabulary: number of tokens.
    """

    kind: Objective
    padding: int
    mask: int | None
    vocabulary: int
    device: torch.device

    @classmethod
    def of(cls, kind: Objective, tokenizer: Any, device: torch.device) -> Collator:
        """The collator that suits `tokenizer`.

        Raises:
            DataError: it has no token to pad with, or to hide others with where that is needed.
        """
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if padding is None:
            raise DataError("the tokenizer has neither a padding token nor an end token, so texts cannot be batched")
        if kind == "masked" and tokenizer.mask_token_id is None:
            raise DataError("the tokenizer has no mask token, so a masked language model cannot be trained with it")
        return cls(kind, padding, tokenizer.mask_token_id, len(tokenizer), device)

    def batch(self, examples: Examples, places: Sequence[int], seeds: Sequence[int]) -> Batch:
        """The texts at `places`; the seed of each decides which of its tokens are hidden, if any are."""
        width = max(examples.length(place) for place in places)
        columns: dict[str, list[list[int]]] = {name: [] for name in (*examples.inputs[places[0]], "attention_mask")}
        labels: list[Any] = []
        for place, seed in zip(places, seeds, strict=True):
            entry = dict(examples.inputs[place])
            ids = entry["input_ids"]
            if self.kind == "classification":
                labels.append(examples.labels[place])
            elif self.kind == "causal":
                labels.append(ids + [IGNORED] * (width - len(ids)))
            else:
                entry["input_ids"], predicted = self._hidden(ids, examples.special[place], seed)
                labels.append(predicted + [IGNORED] * (width - len(ids)))
            for name, values in entry.items():
                columns[name].append(values + [self.padding if name == "input_ids" else 0] * (width - len(ids)))
            columns["attention_mask"].append([1] * len(ids) + [0] * (width - len(ids)))
        inputs = {name: torch.tensor(values, device=self.device) for name, values in columns.items()}
        target = torch.tensor(labels, device=self.device)
        if self.kind == "causal":
            target[:, 0] = IGNORED  # nothing stands before the first token to predict it from
        return Batch(inputs, target)

    def _hidden(self, ids: Sequence[int], special: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
        """`ids` with some hidden, and the labels: the hidden ids at their places."""
        assert self.mask is not None
        random = np.random.Generator(np.random.Philox(seed))
        free = np.flatnonzero(np.asarray(special) == 0)
        chosen = np.sort(random.choice(free, max(1, round(MASKED * len(free))), replace=False))
        seen, labels = np.array(ids), np.full(len(ids), IGNORED)
        labels[chosen] = seen[chosen]
        fate = random.random(len(chosen))
        seen[chosen[fate < 0.8]] = self.mask
        odd = chosen[(fate >= 0.8) & (fate < 0.9)]
        seen[odd] = random.integers(0, self.vocabulary, len(odd))
        return seen.tolist(), labels.tolist()
