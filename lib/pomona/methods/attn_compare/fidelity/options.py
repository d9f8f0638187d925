"""The options of the study fidelity; light enough for ``--help``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pomona.errors import UsageError


@dataclass(frozen=True)
class FidelityOptions:
    """What is judged, and how."""

    panel: ClassVar[str] = "Fidelity"

    qkv: Annotated[Path | None, "queries, keys and values from this .npz instead of from a model"] = None
    synthetic: Annotated[float | None, "Gaussian queries and keys whose scores have this standard deviation"] = None
    text: Annotated[Path | None, "text that learned maps are fitted on; by default one of our own"] = None
    eval_text: Annotated[Path | None, "text that all kernels are judged on; by default another of our own"] = None
    tokens: Annotated[int, "tokens of each text"] = 512
    layers: Annotated[str, "layers to judge: all, or numbers by comma"] = "all"
    learn_steps: Annotated[
        int, "steps of fitting hedgehog and t2r to a head's softmax; 0 leaves them as they begin"
    ] = 60
    full: Annotated[bool, "full attention in fidelity and speed, not causal"] = False
    heatmap: Annotated[Literal["kl", "err", "entropy"], "what the heat maps of layers and heads show"] = "kl"

    def __post_init__(self) -> None:
        given = [name for name in ("qkv", "synthetic", "text", "eval_text") if getattr(self, name) is not None]
        if {"qkv", "synthetic"} & set(given) and len(given) > 1:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{flags} exclude each other", hint="judge a model on texts, or a file, or chance")
        if self.synthetic is not None and not 0 < self.synthetic <= 100:
            raise UsageError(f"--synthetic is {self.synthetic}; a standard deviation of scores lies above 0, to 100")
        if not 16 <= self.tokens <= 8192:
            raise UsageError(f"--tokens is {self.tokens}; give 16 to 8192: whole attention matrices are held")
        if not 0 <= self.learn_steps <= 10**6:
            raise UsageError(f"--learn-steps is {self.learn_steps}; give 0 to 1000000")
        if self.layers != "all" and not all(re.fullmatch("[0-9]{1,9}", p.strip()) for p in self.layers.split(",")):
            raise UsageError(f"--layers {self.layers}: give all, or numbers from 0 by comma, as 0,5,10")
