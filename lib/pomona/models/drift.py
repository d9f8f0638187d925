"""What a change did to a model: two models side by side on the same texts, outputs and every layer compared.

Forward passes run in each model's own number format, differences are taken in float32, sums and divergences in float64.
Padding never counts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pomona.errors import CheckFailed, DataError
from pomona.runtime.progress import Progress, Quiet

_CELLS = 2**20  # numbers compared at once: more would leave the cache, and take five times as long

Batch = dict[str, Tensor]
Kind = Literal["causal", "masked", "seq2seq", "other"]

_NO_PERPLEXITY = {
    "masked": "a masked language model gives running text no probability",
    "seq2seq": "the decoder was given the text that it was to predict",
    "other": "the model is no causal language model",
}


@dataclass(frozen=True)
class Drift:
    """How far `after` is from `before`.

    Attributes:
        output: what the models give: "logits", or "last hidden state" of those without.
        maximum: largest absolute difference of the outputs.
        relative: |after - before| / |before|, L2 over the outputs at all real tokens, or of all texts.
        divergence: mean KL(before || after) in nats; None without logits, or with one alone.
        agreement: share of places where the largest logit is the same one; None likewise.
        perplexity_before: exp of the mean loss of next tokens in nats; None unless both are causal language models.
        no_perplexity: why there is none, otherwise None.
        layers: as `relative`, of the hidden states after each layer, the encoder's before the decoder's. After the last
            layer they are as the model gives them, which is often behind a norm.
        names: what the layers are called: "1", "2", or "encoder 1" where there is a decoder as well.
        texts: how many were compared.
        tokens: how many of them were real.
    """

    output: str
    maximum: float
    relative: float
    divergence: float | None
    agreement: float | None
    perplexity_before: float | None
    perplexity_after: float | None
    no_perplexity: str | None
    layers: tuple[float, ...]
    names: tuple[str, ...]
    texts: int
    tokens: int


def batches(tokenizer: Any, texts: Sequence[str], *, max_length: int, batch_size: int) -> list[Batch]:
    """`texts` as tokens, ``input_ids`` and ``attention_mask`` of shape (batch, length), padded on the right.

    Texts are cut to `max_length` tokens. The longest come first, so that those of one batch are alike in length; texts
    of the same length keep their order. A text without tokens is left out.

    Raises:
        DataError: no text has tokens.
    """
    ids = [row for row in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"] if row]
    if not ids:
        raise DataError("the texts have no tokens")
    ids.sort(key=len, reverse=True)
    padding = next((n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id) if n is not None), 0)
    return [_padded(ids[start : start + batch_size], padding) for start in range(0, len(ids), batch_size)]


def _padded(rows: Sequence[Sequence[int]], padding: int) -> Batch:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def measure(
    before: nn.Module,
    after: nn.Module,
    batches: Sequence[Batch],
    *,
    labels: tuple[str, str] = ("before", "after"),
    progress: Progress | None = None,
) -> Drift:
    """Run both models over `batches` and compare them; they are put into evaluation mode meanwhile.

    The decoder of an encoder-decoder is given the text itself, shifted by one.

    Args:
        labels: what messages call the two models.
        progress: told of every batch.

    Raises:
        CheckFailed: an output or a hidden state is not finite, or the outputs of `before` are zero everywhere.
        DataError: the models' outputs differ in kind or shape, or there are no batches.
    """
    if not batches:
        raise DataError("there is no text to measure drift on")
    watched = progress or Quiet()
    watched.start("drift", len(batches))
    sums = _Sums(_kind(before) if _kind(before) == _kind(after) else "other")
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for model in (before, after):
            stack.enter_context(evaluating(model))
        for batch in batches:
            for part in _singly(batch) if _seeks_padding(before) or _seeks_padding(after) else [batch]:
                sums.add(_outputs(before, part, labels[0]), _outputs(after, part, labels[1]), part)
            watched.advance()
    return sums.drift()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode until the block ends; then every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --- one model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outputs:
    """Of one batch, float32 on the CPU.

    Attributes:
        values: (tokens, width) at the real tokens in order, or (texts, width) where a text has one output.
        layers: (tokens, width) each.
    """

    output: str
    per_token: bool
    values: Tensor
    layers: list[Tensor]
    names: list[str]


def _outputs(model: Any, batch: Batch, label: str) -> _Outputs:
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch.items()}
    real = inputs["attention_mask"].bool()
    if _kind(model) == "seq2seq":
        inputs["decoder_input_ids"] = _shifted(inputs["input_ids"], model.config)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    told = model(**inputs, output_hidden_states=True, return_dict=True)
    states = _states(told)
    logits = told.get("logits")
    values = logits if logits is not None else told.get("last_hidden_state")
    if values is None:
        values = states[-1][1]
    output = "logits" if logits is not None else "last hidden state"
    per_token = values.shape[:2] == real.shape and values.dim() == 3
    values = _comparable(values[real] if per_token else values, f"{label}: {output}")
    layers = [
        _comparable(state[real] if state.shape[:2] == real.shape else state.flatten(0, 1), f"{label}: layer {name}")
        for name, state in states
    ]
    return _Outputs(output, per_token, values, layers, [name for name, _ in states])


def _states(told: Any) -> list[tuple[str, Tensor]]:
    """Hidden states after each layer, by its name; those before the first, the embeddings, are left out."""
    encoder, decoder = told.get("encoder_hidden_states"), told.get("decoder_hidden_states")
    parts = [("encoder ", encoder), ("decoder ", decoder)] if decoder is not None else [("", told.get("hidden_states"))]
    return [
        (f"{name}{number}", state) for name, states in parts for number, state in enumerate((states or ())[1:], start=1)
    ]


def _seeks_padding(model: Any) -> bool:
    """Whether a classifier finds the end of a text by its own padding token, which need not be the tokenizer's."""
    return hasattr(model, "score") and not model.config.is_encoder_decoder


def _singly(batch: Batch) -> Iterator[Batch]:
    """The texts of a batch one at a time, without padding."""
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        yield {"input_ids": ids[mask][None], "attention_mask": torch.ones_like(ids[mask])[None]}


def _comparable(values: Tensor, what: str) -> Tensor:
    found = values.detach().float().cpu()
    if not math.isfinite(float(found.abs().max())):
        raise CheckFailed(f"{what}: {int((~found.isfinite()).sum()):,} numbers are not finite")
    return found


def _shifted(ids: Tensor, config: Any) -> Tensor:
    """What a decoder sees when it is to predict `ids`."""
    start = config.decoder_start_token_id
    first = config.pad_token_id if start is None else start
    return torch.cat([torch.full_like(ids[:, :1], 0 if first is None else first), ids[:, :-1]], dim=1)


def _kind(model: Any) -> Kind:
    """What the model's logits are of, told from the class it is, or derives from."""
    from transformers.models.auto import modeling_auto

    names = {cls.__name__ for cls in type(model).__mro__}
    known: tuple[tuple[Kind, Any], ...] = (
        ("causal", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("masked", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    )
    if model.config.is_encoder_decoder:
        # A classifier shifts its text itself.
        return "other" if any("Classification" in name or "Answering" in name for name in names) else "seq2seq"
    return next((kind for kind, mapping in known if names & set(mapping.values())), "other")


# --- sums ------------------------------------------------------------------------------------------------------------


@dataclass
class _Ratio:
    """|after - before|^2 and |before|^2, summed in float64."""

    error: float = 0.0
    norm: float = 0.0
    maximum: float = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        for x, y in _pieces(before, after):
            difference = y - x
            self.error += float(difference.double().square().sum())
            self.norm += float(x.double().square().sum())
            self.maximum = max(self.maximum, float(difference.abs().max()))

    def relative(self, what: str) -> float:
        if self.error == 0:
            return 0.0
        if self.norm == 0:
            raise CheckFailed(f"{what}: all zero before, so a relative difference has no meaning")
        return math.sqrt(self.error / self.norm)


@dataclass
class _Sums:
    kind: Kind
    output: str = ""
    outputs: _Ratio = field(default_factory=_Ratio)
    layers: list[_Ratio] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    divergence: float = 0.0
    agreeing: int = 0
    places: int = 0  # where distributions were compared
    losses: tuple[float, float] = (0.0, 0.0)
    predicted: int = 0
    texts: int = 0
    tokens: int = 0

    def add(self, before: _Outputs, after: _Outputs, batch: Batch) -> None:
        if (before.output, before.values.shape, before.names) != (after.output, after.values.shape, after.names):
            raise DataError(
                f"models that cannot be compared: {_described(before)} before, {_described(after)} after",
                hint="both need the same head, vocabulary and number of layers",
            )
        if not self.names:
            self.output, self.names = before.output, before.names
            self.layers = [_Ratio() for _ in before.names]
        real = batch["attention_mask"].bool().cpu()
        self.texts += len(real)
        self.tokens += int(real.sum())
        self.outputs.add(before.values, after.values)
        for ratio, *pair in zip(self.layers, before.layers, after.layers, strict=True):
            ratio.add(*pair)
        if before.output == "logits" and before.values.shape[-1] > 1:  # a lone logit is a number, no distribution
            next_tokens = _next_tokens(batch["input_ids"].cpu(), real) if self._predicts(before) else None
            self._compare(before.values, after.values, next_tokens)

    def _predicts(self, outputs: _Outputs) -> bool:
        return self.kind == "causal" and outputs.per_token

    def _compare(self, before: Tensor, after: Tensor, targets: Tensor | None) -> None:
        """Compare distributions; `targets` are the next tokens, -1 where there is none."""
        wanted = torch.full((len(before),), -1) if targets is None else targets
        for x, y, following in _pieces(before, after, wanted):
            p, q = x.double().log_softmax(-1), y.double().log_softmax(-1)
            self.places += len(p)
            self.divergence += float((p.exp() * (p - q)).sum())
            self.agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
            known = following >= 0
            first, second = (float(-rows[known].gather(1, following[known, None]).sum()) for rows in (p, q))
            self.losses = self.losses[0] + first, self.losses[1] + second
            self.predicted += int(known.sum())

    def drift(self) -> Drift:
        without = _NO_PERPLEXITY.get(self.kind) if self.output == "logits" else "the model gives no logits"
        if without is None and self.predicted == 0:
            without = "no text has a second token"
        perplexities = [None, None] if without else [_perplexity(loss / self.predicted) for loss in self.losses]
        return Drift(
            output=self.output,
            maximum=self.outputs.maximum,
            relative=self.outputs.relative(self.output),
            divergence=max(0.0, self.divergence / self.places) if self.places else None,
            agreement=self.agreeing / self.places if self.places else None,
            perplexity_before=perplexities[0],
            perplexity_after=perplexities[1],
            no_perplexity=without,
            layers=tuple(r.relative(f"layer {name}") for r, name in zip(self.layers, self.names, strict=True)),
            names=tuple(self.names),
            texts=self.texts,
            tokens=self.tokens,
        )


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of the same rows, as many rows at a time as have `_CELLS` numbers in the first."""
    rows = max(1, _CELLS // max(1, tensors[0][0].numel()))
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def _described(outputs: _Outputs) -> str:
    return f"{outputs.output} of width {outputs.values.shape[-1]} and {len(outputs.names)} layers"


def _next_tokens(ids: Tensor, real: Tensor) -> Tensor:
    """The token after each real one, in their order, -1 after the last of a text."""
    following = torch.full_like(ids, -1)
    following[:, :-1] = torch.where(real[:, 1:], ids[:, 1:], -1)
    return following[real]


def _perplexity(loss: float) -> float:
    if not loss < 700:  # its exponential would overflow
        raise CheckFailed(f"the mean loss of a token is {loss:g} nats, of which no perplexity can be made")
    return math.exp(loss)
