"""The options of `pomona mera-merge`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pomona.errors import UsageError
from pomona.runtime.ranges import at_least, positive

BOTTLENECK_METHODS = ("avg", "sum", "wts", "acts", "assign")
LORA_METHODS = ("delta-svd", "delta-cat", "linear")


@dataclass(frozen=True)
class FewShotOptions:
    """The other half of the paper: tune the merged adapter on a few labelled examples, its base frozen."""

    panel: ClassVar[str] = "Few-shot"

    few_shot: Annotated[Path | None, "tune the merged adapter on this file of texts and labels, the base frozen"] = None
    test: Annotated[Path | None, "file to test on; by default what is left of --few-shot after the shots"] = None
    shots: Annotated[int, "examples of each label to tune on"] = 16
    epochs: Annotated[int, "passes over the shots"] = 10
    seeds: Annotated[int, "draws of shots and heads to repeat everything with"] = 5
    learning_rate: Annotated[float, "step size of AdamW for adapters and heads"] = 1e-3
    baselines: Annotated[
        bool, "tune each single adapter, their average, AdapterFusion, a fresh adapter and the full model as well"
    ] = False
    text_field: Annotated[str, "field of the text; several by comma are read as segments of one input"] = "text"
    label_field: Annotated[str, "field of the label"] = "label"
    pooling: Annotated[Literal["mean", "first"], "what the head sees: the mean of all tokens, or the first"] = "mean"
    max_length: Annotated[int, "tokens of a text at most"] = 128

    def __post_init__(self) -> None:
        at_least(self, 1, "shots", "epochs", "seeds")
        positive(self, "learning_rate")
        at_least(self, 4, "max_length")
        if self.few_shot is None and (self.test is not None or self.baselines):
            flag = "--test" if self.test is not None else "--baselines"
            raise UsageError(f"{flag} needs --few-shot, the file to tune on")
        for flag, path in (("--few-shot", self.few_shot), ("--test", self.test)):
            if path is not None and str(path) == "-":
                raise UsageError(f"{flag} - : give a file, as it is read more than once")
        if not all(part.strip() for part in self.text_field.split(",")) or not self.label_field:
            raise UsageError("--text-field and --label-field must name fields")


@dataclass(frozen=True)
class Config(FewShotOptions):
    """How adapters become one, and how that is checked."""

    method: Annotated[
        str | None,
        "bottlenecks: avg, sum, wts (transport on weights), acts (on activations), assign; "
        "LoRA: delta-svd, delta-cat, linear; IA3: avg. By default wts, delta-svd, avg",
    ] = None
    weights: Annotated[str | None, "weights of the adapters by comma, in their order; by default all alike"] = None
    normalize: Annotated[bool, "make the weights sum to 1; sum never does"] = True
    reference: Annotated[
        str, "adapter whose units the others are matched to: first (of those named), medoid, or a label"
    ] = "first"
    features: Annotated[
        Literal["down", "down+bias", "down+up"], "what describes a unit to wts and assign (paper: its incoming weights)"
    ] = "down+bias"
    metric: Annotated[Literal["euclidean", "cosine"], "distance between units"] = "euclidean"
    solver: Annotated[
        str, "exact, or sinkhorn:REG (share of the largest distance), whose plans blend units and change the function"
    ] = "exact"
    rank: Annotated[int | None, "rank of delta-svd; by default the largest of the adapters'"] = None
    base_model: Annotated[
        str | None, "model the adapters were trained on: minilm (embedded), a directory or a hub id"
    ] = None
    calib: Annotated[Path | None, "unlabelled text for acts, and to measure drift on; by default some of our own"] = (
        None
    )
    calib_samples: Annotated[int, "texts of --calib to read"] = 200
    act: Annotated[Literal["pre", "post"], "activations that acts compares: before or after the nonlinearity"] = "pre"
    tracks: Annotated[Path | None, "JSON or TOML file that gives the track of each adapter by its label"] = None
    track: Annotated[str | None, "merge the adapters of this track alone"] = None
    cross_track: Annotated[Literal["warn", "error"], "when adapters of several tracks are merged"] = "warn"
    heads: Annotated[Literal["drop", "keep-reference", "average"], "prediction heads that adapters come with"] = "drop"
    allow_resize: Annotated[bool, "let adapters of unequal width be transported to the reference's"] = False
    allow_pickle: Annotated[bool, "read pytorch_adapter.bin, by torch's weights-only loader"] = False
    max_drift: Annotated[
        float | None, "fail (exit 9) when the merged model's relative drift from the reference's is above this"
    ] = None

    def __post_init__(self) -> None:
        FewShotOptions.__post_init__(self)
        if self.method is not None and self.method not in (*BOTTLENECK_METHODS, *LORA_METHODS):
            raise UsageError(f"--method {self.method}: expected {', '.join((*BOTTLENECK_METHODS, *LORA_METHODS))}")
        parse_weights(self.weights)
        if regularisation(self.solver) is not None and self.method not in (None, "wts", "acts"):
            raise UsageError(f"--solver {self.solver} is for wts and acts; --method {self.method} transports nothing")
        at_least(self, 1, "rank", "calib_samples")
        if self.max_drift is not None and not self.max_drift >= 0:
            raise UsageError(f"--max-drift must not be negative, not {self.max_drift}")
        if self.method == "acts" and self.base_model is None:
            raise UsageError("--method acts needs --base-model, whose activations it compares")
        if self.few_shot is not None and self.base_model is None:
            raise UsageError("--few-shot needs --base-model, which the adapter sits in")
        if self.max_drift is not None and self.base_model is None:
            raise UsageError("--max-drift needs --base-model, as drift is measured on its outputs")
        if self.calib is not None and self.base_model is None:
            raise UsageError("--calib needs --base-model, which reads it")
        if self.track is not None and self.tracks is None:
            raise UsageError("--track needs --tracks, the file that says which adapter is of which track")


def parse_weights(text: str | None) -> list[float] | None:
    """The weights of a list by comma.

    Raises:
        UsageError: one is no finite number.
    """
    if text is None:
        return None
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--weights {text}: give numbers by comma, as 0.5,0.3,0.2") from error
    if not all(map(math.isfinite, weights)):
        raise UsageError(f"--weights {text}: all must be finite")
    return weights


def regularisation(solver: str) -> float | None:
    """The entropic regularisation of ``sinkhorn:REG``, None of ``exact``.

    Raises:
        UsageError: it is neither.
    """
    if solver == "exact":
        return None
    found = re.fullmatch(r"sinkhorn:([0-9.eE+-]+)", solver)
    try:
        value = float(found[1]) if found else 0.0
    except ValueError:
        value = 0.0
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"--solver {solver}: expected exact or sinkhorn:REG with REG above 0, as sinkhorn:0.01")
    return value
