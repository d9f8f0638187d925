"""The options of `pomona meo-convert`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pomona.errors import UsageError
from pomona.runtime.ranges import at_least, positive

WEIGHTS = ("uniform", "router-frequency", "router-prob")


@dataclass(frozen=True)
class TrainingOptions:
    """Training of a model with experts, merged or mixed, on a file of texts."""

    panel: ClassVar[str] = "Training"

    train: Annotated[Path | None, "train on this file before writing: texts, with labels for classification"] = None
    test: Annotated[Path | None, "measure before and after on this file; by default a tenth of --train"] = None
    steps: Annotated[int, "training steps"] = 200
    learning_rate: Annotated[float, "step size of AdamW (released scripts: 1e-5 to 1e-4)"] = 1e-4
    balance: Annotated[float, "weight of the load-balancing loss (released code: 0.01; task level never has it)"] = 0.01
    text_field: Annotated[str, "field of the text"] = "text"
    label_field: Annotated[str | None, "field of the label, for classification; without it, language modelling"] = None
    max_length: Annotated[int, "tokens of a text at most"] = 128

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")
        positive(self, "learning_rate")
        if not (math.isfinite(self.balance) and self.balance >= 0):
            raise UsageError(f"--balance must not be negative, not {self.balance}")
        at_least(self, 4, "max_length")
        if self.train is None and self.test is not None:
            raise UsageError("--test needs --train, the file to train on")


@dataclass(frozen=True)
class ExpertOptions:
    """Experts whose merge depends on the input: made from a dense model, or kept from a mixture."""

    panel: ClassVar[str] = "Experts"

    experts: Annotated[int, "experts that each linear map of a dense model is copied into"] = 8
    selected: Annotated[int | None, "experts selected by a gate; by default 2, or what the source selects"] = None
    init: Annotated[str, "copy, or noise:EPS, Gaussian noise of EPS times the weights' standard deviation"] = "copy"
    run_as: Annotated[Literal["meo", "moe"], "merge the selected experts (paper), or mix their outputs"] = "meo"
    gate_scope: Annotated[
        str | None,
        "what the sequence gate sees: sequence (encoders), prompt (decoders), segment:LEN (the segment before)",
    ] = None
    token_reduction: Annotated[int, "width of the model over that of the token-level block (paper: 64)"] = 64
    task_description: Annotated[str | None, "text the task-level gate sees, the same for every input"] = None
    compat: Annotated[
        Literal["none", "reference"], "reference repeats the released code's dropped biases and padded gates"
    ] = "none"

    def __post_init__(self) -> None:
        at_least(self, 1, "experts", "selected", "token_reduction")
        noise(self.init)
        if self.gate_scope is not None:
            segment(self.gate_scope)


@dataclass(frozen=True)
class Config(TrainingOptions, ExpertOptions):
    """What becomes of the experts, and how that is checked."""

    level: Annotated[
        Literal["auto", "task", "sequence", "token"],
        "what a merge depends on: task (once, offline; default of mixtures), sequence (of dense models), token",
    ] = "auto"
    arch: Annotated[
        Literal["auto", "single-expert", "dense-twin"],
        "of a static merge: the same family with one expert, or its dense twin where one exists",
    ] = "auto"
    weights: Annotated[
        str | None,
        "of a static merge: uniform, router-frequency, router-prob, or a JSON file; by default uniform, or the gates "
        "of a source trained at the task level",
    ] = None
    calib: Annotated[Path | None, "text for router weights, activations and verification; by default our own"] = None
    calib_samples: Annotated[int, "texts of --calib to read"] = 64
    align: Annotated[
        Literal["none", "weights", "activations"], "match the hidden units of experts before a static merge"
    ] = "none"
    reference_expert: Annotated[str, "expert the others are matched to: most-used, or its index"] = "most-used"
    mass: Annotated[
        Literal["keep", "one"], "gates that do not sum to 1: put their mean mass on the output map, or forget it"
    ] = "keep"
    verify: Annotated[Literal["none", "quick", "full"], "measure drift on a few calibration texts, or on all"] = "quick"
    max_drift: Annotated[float, "fail (exit 9) when the relative drift of the outputs is above this"] = 0.1
    keep_failed: Annotated[bool, "write the directory even so"] = False
    shard_size: Annotated[str, "largest file of weights, as 500MB or 5GB"] = "5GB"
    save_dtype: Annotated[
        Literal["source", "float32", "bfloat16", "float16"], "number format to write; sums are in float64 always"
    ] = "source"

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        ExpertOptions.__post_init__(self)
        if self.weights is not None and self.weights not in WEIGHTS and not self.weights.endswith(".json"):
            raise UsageError(f"--weights {self.weights}: expected {', '.join(WEIGHTS)} or a .json file")
        at_least(self, 1, "calib_samples")
        if self.reference_expert != "most-used" and not re.fullmatch("[0-9]{1,5}", self.reference_expert):
            raise UsageError(f"--reference-expert {self.reference_expert}: expected most-used or an index from 0")
        if not self.max_drift >= 0:
            raise UsageError(f"--max-drift must not be negative, not {self.max_drift}")
        size(self.shard_size)


def noise(init: str) -> float:
    """The EPS of ``noise:EPS``, 0 of ``copy``.

    Raises:
        UsageError: it is neither.
    """
    return 0.0 if init == "copy" else _number(init, "noise", "--init", "copy or noise:EPS, as noise:0.01")


def segment(scope: str) -> int | None:
    """The LEN of ``segment:LEN``, None of the scopes ``prompt`` and ``sequence``.

    Raises:
        UsageError: it is none of these.
    """
    if scope in ("prompt", "sequence"):
        return None
    expected = "prompt, sequence or segment:LEN, as segment:64"
    length = _number(scope, "segment", "--gate-scope", expected)
    if length != int(length) or length >= 10**9:
        raise UsageError(f"--gate-scope {scope}: expected {expected}")
    return int(length)


def size(text: str) -> int:
    """Bytes of a size such as 500MB or 5GB (powers of ten).

    Raises:
        UsageError: it is no such size, or nothing.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?B)", text.strip(), re.IGNORECASE)
    number = float(found[1]) * 1000 ** ["B", "KB", "MB", "GB", "TB"].index(found[2].upper()) if found else 0.0
    if not 1 <= number < 2**63:
        raise UsageError(f"--shard-size {text}: expected a size as 500MB or 5GB")
    return int(number)


def _number(text: str, name: str, flag: str, expected: str) -> float:
    found = re.fullmatch(rf"{name}:([0-9.eE+-]+)", text)
    try:
        value = float(found[1]) if found else 0.0
    except ValueError:
        value = 0.0
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{flag} {text}: expected {expected}")
    return value
