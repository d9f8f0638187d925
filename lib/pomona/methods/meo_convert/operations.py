"""What a model costs to run, before and after: FLOPs of a forward pass in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pomona.methods.meo_convert.families import resolved
from pomona.models import flops

LENGTHS = (1, 128, 512)
"""Tokens of the sequence that operations are told for."""


def operations(source: Mapping[str, Any], output: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """By number of tokens, FLOPs for one sequence: of the source, a mixture of as many selected experts, the output.

    Args:
        source: config.json of the source.
        output: that of the output.
    """
    selected = (output.get("meo") or source.get("meo") or {}).get("selected")  # a mixture knows its own
    return {
        str(tokens): {
            "before": _forward(source, tokens),
            "mixture": flops.forward(resolved(source), tokens, experts=selected).total,
            "after": _forward(output, tokens),
        }
        for tokens in LENGTHS
    }


def _forward(config: Mapping[str, Any], tokens: int) -> int:
    """FLOPs of a plain model, or of one with experts as its block "meo" says (its gates left out, as in the paper)."""
    meo = config.get("meo")
    if meo is None:
        return flops.forward(resolved(config), tokens).total
    merged = meo["run_as"] == "meo"
    reduction = meo["token_reduction"] if merged and meo["level"] == "token" else None
    found = flops.forward(resolved(config), tokens, experts=meo["selected"], merged=merged, token_reduction=reduction)
    return found.total
