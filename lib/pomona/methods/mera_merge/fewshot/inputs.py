"""Texts as a base model reads them, and what it makes of them before the first adapter.

The base is frozen, so what it computes up to the first place of an adapter is computed once, whatever is tuned behind
it, as long as it fits into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pomona.methods.mera_merge.bottleneck import AdaptedOutput, Place, layers

BATCH = 64
"""Texts in a batch of work without gradients."""
KEPT_BYTES = 2**30


class Inputs:
    """Tokenised texts.

    Attributes:
        lengths: tokens of each text.
    """

    def __init__(
        self, tokenizer: Any, texts: Sequence[tuple[str, ...]], *, max_length: int, device: torch.device
    ) -> None:
        self._device = device
        self._padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        seam = f" {tokenizer.sep_token} " if tokenizer.sep_token else " "
        firsts = [text[0] for text in texts]
        # Tokenizers know pairs; of more segments, those from the second on are one text.
        seconds = [seam.join(text[1:]) for text in texts] if len(texts[0]) > 1 else None
        read = tokenizer(firsts, seconds, truncation=True, max_length=max_length, return_attention_mask=False)
        self._columns = {name: [torch.tensor(row) for row in rows] for name, rows in read.items()}
        self.lengths = [len(row) for row in self._columns["input_ids"]]

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, places: Sequence[int]) -> dict[str, Tensor]:
        """The texts at `places`, padded, with their ``attention_mask``."""
        padded = {
            name: pad_sequence([rows[place] for place in places], True, self._padding[name])
            for name, rows in self._columns.items()
        }
        ones = [torch.ones(self.lengths[place], dtype=torch.int64) for place in places]
        padded["attention_mask"] = pad_sequence(ones, batch_first=True)
        return {name: tensor.to(self._device) for name, tensor in padded.items()}

    def by_length(self, places: Sequence[int]) -> Iterator[list[int]]:
        """`places` in batches of texts of like length, the longest first."""
        ordered = sorted(places, key=lambda place: (-self.lengths[place], place))
        for start in range(0, len(ordered), BATCH):
            yield ordered[start : start + BATCH]


def longest(config: Any) -> int | None:
    """The most tokens that a model of `config` reads at once, None where positions have no end.

    RoBERTa's positions begin after that of padding.
    """
    positions = getattr(config, "max_position_embeddings", None)
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return None if positions is None else int(positions) - offset


@dataclass(frozen=True)
class Halted:
    """What a base model has computed when it comes to the first adapter.

    Attributes:
        hidden: (b, s, d), what the sub-layer's map gave.
        entering: (b, s, d), what its residual connection brings.
        real: (b, s), whether a token is no padding.
    """

    hidden: Tensor
    entering: Tensor
    real: Tensor


class Prefix:
    """The part of a frozen model before the first place of an adapter.

    Args:
        model: in evaluation mode; adapters may be attached and removed between calls, none before `place`.
    """

    def __init__(self, model: Any, place: Place, inputs: Inputs) -> None:
        self.model, self.place, self._inputs = model, place, inputs
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        needed = 2 * sum(inputs.lengths) * model.config.hidden_size * 4
        if needed <= KEPT_BYTES:
            for places in inputs.by_length(range(len(inputs))):
                halted = self._compute(places)
                for row, index in enumerate(places):
                    length = inputs.lengths[index]
                    self._kept[index] = halted.hidden[row, :length].clone(), halted.entering[row, :length].clone()

    def at(self, places: Sequence[int]) -> Halted:
        """What the model computes of the texts at `places` before the first adapter."""
        if not self._kept:
            return self._compute(places)
        hidden, entering = (
            pad_sequence([self._kept[place][part] for place in places], batch_first=True) for part in (0, 1)
        )
        lengths = torch.tensor([self._inputs.lengths[place] for place in places], device=hidden.device)
        return Halted(hidden, entering, torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None])

    @torch.no_grad()
    def _compute(self, places: Sequence[int]) -> Halted:
        batch = self._inputs.batch(places)
        seen: dict[str, Tensor] = {}
        output: Any = self.place.owner(self.model).output

        def arrive(module: Any, arguments: tuple[Tensor, Tensor]) -> None:
            seen["entering"] = arguments[1]

        def stop(module: Any, arguments: Any, result: Tensor) -> None:
            seen["hidden"] = result
            raise _Arrived

        hooks = [output.register_forward_pre_hook(arrive), output.dense.register_forward_hook(stop)]
        try:
            self.model.base_model(**batch)
        except _Arrived:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return Halted(seen["hidden"], seen["entering"], batch["attention_mask"].bool())


class _Arrived(Exception):
    """The model has come to the first adapter; what lies behind it is not computed."""


def resume(model: Any, place: Place, halted: Halted) -> Tensor:
    """The last hidden state (b, s, d) of `model`, whose adapters are attached from `place` on."""
    layer: Any = layers(model)[place.layer]
    output: Any = place.owner(model).output
    assert isinstance(output, AdaptedOutput), "an adapter is attached"
    hidden = output.adapted(halted.hidden, halted.entering)
    if place.half == 0:
        hidden = layer.feed_forward_chunk(hidden)
    mask = None
    if not halted.real.all():
        # Added to the scores, so that every implementation of attention takes it.
        lowest = torch.finfo(hidden.dtype).min
        mask = torch.where(halted.real, 0.0, lowest)[:, None, None, :].to(hidden.dtype)
    for layer in list(layers(model))[place.layer + 1 :]:
        hidden = layer(hidden, mask)
    return hidden


def pooled(states: Tensor, real: Tensor, pooling: str) -> Tensor:
    """(b, d): the mean of the `real` (b, s) tokens' `states` (b, s, d), or the first token's."""
    if pooling == "first":
        return states[:, 0]
    weights = real[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)
