"""The options of `pomona attn-compare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pomona.errors import UsageError
from pomona.methods.attn_compare.fidelity.options import FidelityOptions
from pomona.methods.attn_compare.recall.options import RecallOptions
from pomona.methods.attn_compare.separation.options import SeparationOptions
from pomona.methods.attn_compare.speed.options import SpeedOptions
from pomona.runtime.ranges import at_least

STUDIES = ("separation", "fidelity", "recall", "speed")


@dataclass(frozen=True)
class Config(SpeedOptions, RecallOptions, FidelityOptions, SeparationOptions):
    """Which studies, with which kernels, and the conditions of each."""

    study: Annotated[
        tuple[str, ...], "separation, fidelity, recall, speed or all; give it again for several of them"
    ] = ()
    kernels: Annotated[
        str | None, "kernels by comma, as exp,elu1,favor:256,pow:2..16; by default those that suit each study"
    ] = None
    list_kernels: Annotated[bool, "print the registry of kernels as JSONL, measure nothing"] = False
    merge: Annotated[bool, "the arguments are finished runs: write one report over all of them"] = False
    jobs: Annotated[int, "processes that measure side by side; speed is always measured alone"] = 1

    def __post_init__(self) -> None:
        for options in (SeparationOptions, FidelityOptions, RecallOptions, SpeedOptions):
            options.__post_init__(self)
        for study in self.study:
            if study not in (*STUDIES, "all"):
                raise UsageError(f"--study {study}: expected {', '.join(STUDIES)} or all")
        if self.merge and self.study:
            raise UsageError("--merge and --study exclude each other: runs are merged as they are")
        if self.kernels is not None and not self.kernels.strip(" ,"):
            raise UsageError("--kernels names no kernel", hint="--list-kernels prints them")
        at_least(self, 1, "jobs")
