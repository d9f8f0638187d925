"""The options of the study separation; light enough for ``--help``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pomona.errors import UsageError
from pomona.methods.attn_compare.separation import constants


@dataclass(frozen=True)
class SeparationOptions:
    """The constants of the construction, and how they vary."""

    panel: ClassVar[str] = "Separation"

    preset: Annotated[
        Literal["paper", "finite"],
        "constants of the construction: paper, a_0 in (0, 0.1) and a_1 from 0.7; finite, what suffices at this n",
    ] = "paper"
    n: Annotated[int, "tokens of the construction, a multiple of d - 2"] = 1000
    d: Annotated[int, "width of its tokens"] = 102
    m: Annotated[int, "random sign vectors in the second layer"] = 20
    a0: Annotated[float, "amplitude of the special token in the data set D0"] = 0.05
    a1: Annotated[
        float | None, "amplitude of the special token in the data set D1; by default 1, or what suffices at this n"
    ] = None
    c: Annotated[float, "share of the constant column; b = 1 - c"] = 0.9
    sweep: Annotated[
        tuple[str, ...], "vary one constant, as a1=0.3:1.2:0.05 or n=100,1000,10000; by default all are swept"
    ] = ()
    trials: Annotated[int, "draws of the sign vectors for each point"] = 1000
    variant: Annotated[
        Literal["self", "cross"], "self-attention as in the paper, or a declared reading of its cross-attention"
    ] = "self"
    g: Annotated[float, "row sum of the queries of the variant cross, in units of sqrt(log n)"] = 2.0
    fit_n: Annotated[bool, "round n to the nearest multiple of d - 2 instead of refusing it"] = False
    dense_check: Annotated[bool, "also evaluate the networks token by token and print the largest difference"] = False
    find_amplitude: Annotated[bool, "also find the amplitude from which each kernel separates"] = False

    def __post_init__(self) -> None:
        if not 1 <= self.trials <= 10**7:
            raise UsageError(f"--trials is {self.trials}; give 1 to 10^7")
        n = constants.fitted(self.n, self.d) if self.fit_n else self.n
        a1 = 1.0 if self.a1 is None else self.a1
        constants.Constants(n, self.d, self.m, self.a0, a1, self.c, self.variant, self.g)
        names = [constants.parse(text)[0] for text in self.sweep]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"--sweep {name} is given twice; name all its values in one")
