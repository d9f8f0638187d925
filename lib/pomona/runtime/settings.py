"""The options every command has, with the same name and meaning everywhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pomona.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """What a run needs to know besides its method's own `Config`."""

    model: Annotated[
        str | None,
        "model: an embedded one (`pomona models` lists them), a local directory, a GGUF file or a hub id; the model's "
        "name at a remote endpoint",
    ] = None
    device: Annotated[str, "auto, cpu, cuda, cuda:N or mps"] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        "number format of the model; auto is bfloat16 where the hardware has it, else float32",
    ] = "auto"
    batch_size: Annotated[int | None, "most sequences or images in one batch; by default memory and speed decide"] = (
        None
    )
    seed: Annotated[int, "seed of everything random"] = 0
    limit: Annotated[int | None, "read only the first N records"] = None
    overwrite: Annotated[bool, "replace an existing output and forget an earlier run's journal"] = False
    resume: Annotated[bool, "continue an interrupted run of the same command; ends with the same bytes"] = False
    dry_run: Annotated[bool, "check everything, print the plan as JSON, write nothing, ask nothing"] = False
    output: Annotated[Path | None, "write here instead of to standard output; the suffix picks the format"] = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < (0 if name == "limit" else 1):
                raise UsageError(
                    f"--{name.replace('_', '-')} is {value}; it must be {'0' if name == 'limit' else '1'} or more"
                )
        if not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"--seed is {self.seed}; it must fit into 64 bits")
        if self.model == "":
            raise UsageError("--model is empty", hint="leave it out for the embedded model")
        if any("\ud800" <= c <= "\udfff" for c in self.model or ""):
            raise UsageError(f"--model {self.model!r} is not valid Unicode")
        if self.overwrite and self.resume:
            raise UsageError("--overwrite and --resume exclude each other")

    def decisive(self) -> Settings:
        """These settings without what says where a run takes place and where its output goes."""
        return replace(self, device="auto", overwrite=False, resume=False, dry_run=False, output=None)
