"""What the routers of a mixture do on text: how often each expert is chosen, how probable it is, how much passes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pomona.errors import CheckFailed, DataError
from pomona.methods.meo_convert.families import natural

_BLOCK = re.compile(r"(?:.*\.)?(?:(?P<side>encoder|decoder)\.block|layers)\.(?P<index>\d+)\..*?mlp")


@dataclass(frozen=True)
class Routing:
    """What one layer's router did.

    Attributes:
        frequency: (n,), share of an expert in all choices made for real tokens; sums to 1.
        probability: (n,), mean softmax probability; sums to 1.
        mass: mean sum of the gates of the chosen experts, 1 where they are normalised.
        tokens: real ones.
        inputs: (t, d), what the experts saw, of the first t real tokens, float32; t is 0 unless asked for.
        outputs: (t, d), what the mixture made of them, without a shared expert.
    """

    frequency: Tensor
    probability: Tensor
    mass: float
    tokens: int
    inputs: Tensor
    outputs: Tensor


def statistics(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], *, keep: int = 0) -> dict[str, Routing]:
    """What every router of `model` does on `batches`, padding apart, by the names that `families` gives the layers.

    Args:
        model: a mixture as transformers loads it; it is put in evaluation mode.
        batches: input_ids, and attention_mask where some are padded. A decoder that has no decoder_input_ids reads the
            same text, one token late.
        keep: real tokens of which inputs and outputs of the experts are kept.

    Raises:
        DataError: the model has no routers, or there is no token.
        CheckFailed: a router's logits are not finite.
    """
    model.eval()
    blocks = dict(_blocks(model))
    if not blocks:
        raise DataError(f"{type(model).__name__} has no routers")
    watched = {name: _Watch(name, keep) for name in sorted(blocks, key=natural)}
    device = next(model.parameters()).device
    with ExitStack() as hooks, torch.inference_mode():
        for name, watch in watched.items():
            hooks.enter_context(_hooked(blocks[name], watch))
        for batch in batches:
            given = {key: value.to(device) for key, value in batch.items() if key in _TAKEN}
            masks = _masks(model, given)
            for name, watch in watched.items():
                watch.real = masks["decoder" if name.startswith("decoder.") else "encoder"]
            model(**given, use_cache=False)
    return {name: watch.result() for name, watch in watched.items()}


_TAKEN = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


def _masks(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which positions are real tokens, flat, of both stacks; completes `batch` for a decoder."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    masks = {"encoder": mask.flatten().bool()}
    if model.config.is_encoder_decoder:
        if "decoder_input_ids" not in batch:
            start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id or model.config.pad_token_id or 0)
            batch["decoder_input_ids"] = torch.cat([start, ids[:, :-1]], 1)
            batch["decoder_attention_mask"] = mask
        own = batch.get("decoder_attention_mask", torch.ones_like(batch["decoder_input_ids"]))
        masks["decoder"] = own.flatten().bool()
    return masks


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold a router and its experts, by the layer's name."""
    for path, module in model.named_modules():
        if hasattr(module, "experts") and _router(module) is not None and (place := _BLOCK.fullmatch(path)):
            yield ".".join(part for part in (place["side"], place["index"]) if part), module


def _router(block: nn.Module) -> nn.Module | None:
    for name in ("gate", "router"):
        found = getattr(block, name, None)
        if isinstance(found, nn.Module) and type(found).__name__.endswith("Router"):
            return found
    return None


@contextmanager
def _hooked(block: nn.Module, watch: _Watch) -> Iterator[None]:
    router, experts = _router(block), block.experts
    assert router is not None and isinstance(experts, nn.Module)
    hooks = [
        router.register_forward_hook(lambda module, given, output: watch.routed(*output)),
        experts.register_forward_hook(lambda module, given, output: watch.passed(given[0], output)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Watch:
    """Sums over the batches of what one block does."""

    def __init__(self, layer: str, keep: int) -> None:
        self.layer = layer
        self.real = torch.empty(0, dtype=torch.bool)
        self._keep = keep
        self._chosen: Tensor | float = 0.0
        self._probable: Tensor | float = 0.0
        self._mass = 0.0
        self._tokens = 0
        self._seen: list[tuple[Tensor, Tensor]] = []

    def routed(self, first: Tensor, scores: Tensor, last: Tensor) -> None:
        """A router's output: (logits, gates, indices), or Switch's (one-hot choice within capacity, gate, logits)."""
        switch = first.shape == last.shape and first.dtype == torch.int64
        logits = (last if switch else first).flatten(0, -2)[self.real].double()
        if not bool(logits.isfinite().all()):
            raise CheckFailed(f"layer {self.layer}: the router's logits are not finite")
        gates = scores.flatten(0, -2)[self.real].double()
        if switch:
            chosen = first.flatten(0, -2)[self.real].double()
            gates = gates * chosen.sum(1, keepdim=True)  # what exceeds an expert's capacity passes it by
        else:
            indices = last.flatten(0, -2)[self.real]
            chosen = torch.zeros_like(logits).scatter_(1, indices, 1.0)
        self._chosen = self._chosen + chosen.sum(0)
        self._probable = self._probable + logits.softmax(1).sum(0)
        self._mass += float(gates.sum())
        self._tokens += len(logits)

    def passed(self, given: Tensor, output: Tensor) -> None:
        left = self._keep - sum(len(seen) for seen, _ in self._seen)
        if left > 0:
            rows = self.real.nonzero().flatten()[:left]
            self._seen.append((_rows(given, rows), _rows(output, rows)))

    def result(self) -> Routing:
        if not self._tokens or isinstance(self._chosen, float) or isinstance(self._probable, float):
            raise DataError("the routers saw no token", hint="is the calibration text empty?")
        inputs, outputs = (torch.cat(parts) for parts in zip(*self._seen, strict=True)) if self._seen else _none()
        return Routing(
            (self._chosen / self._chosen.sum()).cpu(),
            (self._probable / self._tokens).cpu(),
            self._mass / self._tokens,
            self._tokens,
            inputs,
            outputs,
        )


def _rows(states: Tensor, rows: Tensor) -> Tensor:
    return states.flatten(0, -2)[rows].float().cpu().clone()


def _none() -> tuple[Tensor, Tensor]:
    return torch.empty(0, 0), torch.empty(0, 0)
