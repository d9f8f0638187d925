"""What adapters cost: parameters, bytes, and operations beside those of their base."""

from __future__ import annotations

from collections.abc import Sequence

from pomona.methods.mera_merge import peft_format
from pomona.methods.mera_merge.adapters import Adapter

LENGTHS = (1, 128, 512)
"""Tokens of the sequence that operations are told for."""


def parameters(adapter: Adapter) -> int:
    """Numbers in the adapter's tensors, its head left out."""
    return sum(tensor.numel() for tensor in adapter.tensors.values())


def operations(adapter: Adapter, tokens: int) -> int:
    """Floating-point operations of the adapter's products for one sequence; a multiplication and an addition are two.

    A bottleneck of r units in a stream of width d takes ``4 S r d``, LoRA factors of rank r ``2 S r (in + out)``, an
    (IA)^3 vector of n ``S n``. Biases and nonlinearities are left out, as torch's counter leaves them out, and so are
    the rows that an embedding looks up.
    """
    if adapter.kind == "bottleneck":
        return sum(2 * tokens * tensor.numel() for tensor in adapter.tensors.values() if tensor.dim() == 2)
    factors = [
        (part, adapter.tensors[name])
        for names in peft_format.module_names(adapter.tensors).values()
        for part, name in names.items()
        if part != "bias" and not name.endswith("lora_embedding_A")
    ]
    return sum(tokens * tensor.numel() * (1 if part == "scale" else 2) for part, tensor in factors)


def composed(adapters: Sequence[Adapter], tokens: int) -> int:
    """Operations of all adapters side by side, under AdapterFusion where they are several bottlenecks.

    At a site of width d, AdapterFusion multiplies a query, a key of each adapter, and their mixture as its value, with
    d x d, and takes ``4 S N d`` for scores and the mixture: ``2 S d^2 (2 + N) + 4 S N d`` (Pfeiffer et al., 2021,
    Eq. 2, whose value of each adapter is linear and so is taken once, of the mixture).
    """
    counted = sum(operations(adapter, tokens) for adapter in adapters)
    if len(adapters) > 1:
        for site in adapters[0].sites().values():
            width, count = site.up.shape[0], len(adapters)
            counted += 2 * tokens * width * width * (2 + count) + 4 * tokens * count * width
    return counted


def table(adapters: Sequence[Adapter], merged: Adapter) -> dict[str, dict[str, int]]:
    """By number of tokens, the operations of all `adapters` and of the `merged` one."""
    return {str(n): {"before": composed(adapters, n), "after": operations(merged, n)} for n in LENGTHS}
