"""What the options of the speed study say, read from text; nothing here needs torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pomona.errors import UsageError

PASSES = ("fwd", "train", "decode")
IMPLEMENTATIONS = ("sdpa", "eager", "flex", "chunked", "batched", "quadratic", "prefix-sum")
BY_DEFAULT = tuple(name for name in IMPLEMENTATIONS if name != "flex")  # which compiles for half a minute first
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class SpeedOptions:
    """What is timed, and what is too much to be timed."""

    panel: ClassVar[str] = "Speed"

    lengths: Annotated[str, "lengths, as 128:16384:x2 or by comma"] = "128:8192:x2"
    heads: Annotated[int, "heads in speed"] = 8
    dim: Annotated[str, "widths of a head in speed, by comma"] = "64"
    passes: Annotated[str, "fwd, train (forward and backward), decode; several by comma"] = "fwd,train,decode"
    impls: Annotated[
        str | None,
        "by comma: sdpa, eager, flex, chunked, batched, quadratic, prefix-sum; by default all but flex, which compiles",
    ] = None
    threads: Annotated[int, "threads of the processor in speed"] = 1
    repeats: Annotated[int, "timings of each point, interleaved"] = 5
    max_mem: Annotated[str, "skip points that are predicted to need more memory, as 4GB or 200MB"] = "4GB"
    max_seconds: Annotated[float, "skip points whose one pass is predicted to take longer"] = 10.0
    xf_8192: Annotated[bool, "speed at one length alone: batch 1, 8192 tokens, 8 heads of 128, causal, forward"] = False

    def __post_init__(self) -> None:
        lengths(self.lengths)
        widths(self.dim)
        passes(self.passes)
        memory(self.max_mem)
        if self.impls is not None:
            implementations(self.impls)
        for option, least, most in (("heads", 1, 65_536), ("threads", 1, 256), ("repeats", 2, 1000)):
            if not least <= getattr(self, option) <= most:
                raise UsageError(f"--{option} is {getattr(self, option)}; give {least} to {most}")
        if not 0 < self.max_seconds < float("inf"):
            raise UsageError(f"--max-seconds is {self.max_seconds}; it must be more than 0")


def lengths(text: str) -> list[int]:
    """The lengths of ``128:8192:x2`` (a factor), ``128:512:128`` (a step) or ``128,1000``, ascending, each once.

    Raises:
        UsageError: it is none of these.
    """
    span = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9}):(x?)([0-9]{1,9})", text.strip())
    if span is None:
        return sorted(set(_numbers("--lengths", text, 1 << 24, "or FIRST:LAST:xFACTOR, as 128:8192:x2")))
    first, last, by = int(span[1]), int(span[2]), int(span[4])
    if not 1 <= first <= last <= 1 << 24 or by < (2 if span[3] else 1):
        raise UsageError(f"--lengths {text}: expected FIRST:LAST:xFACTOR with FIRST up to LAST and a FACTOR from 2")
    if not span[3]:
        return list(range(first, last + 1, by))
    found = [first]
    while found[-1] * by <= last:
        found.append(found[-1] * by)
    return found


def widths(text: str) -> list[int]:
    """Widths of a head by comma, each once; UsageError where one is not a number from 1 to 1024."""
    return list(dict.fromkeys(_numbers("--dim", text, 1024, "as 64,128")))


def passes(text: str) -> list[str]:
    """Passes by comma, each once; UsageError where there is no such pass."""
    return _names("--passes", text, PASSES)


def implementations(text: str) -> list[str]:
    """Implementations by comma, each once; UsageError where there is no such implementation."""
    return _names("--impls", text, IMPLEMENTATIONS)


def memory(text: str) -> int:
    """Bytes of ``4GB``, ``200MB``, ``1.5GiB`` or a bare number; UsageError where it is none of these, or over 10^18."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    nbytes = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if not 1 <= nbytes <= 10**18:
        raise UsageError(f"--max-mem {text}: expected a size, as 4GB or 200MB")
    return nbytes


def _numbers(option: str, text: str, most: int, form: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(re.fullmatch("[0-9]{1,9}", part) and 1 <= int(part) <= most for part in parts):
        raise UsageError(f"{option} {text}: expected whole numbers from 1 to {most:,} by comma, {form}")
    return [int(part) for part in parts]


def _names(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if unknown := [part for part in parts if part not in known]:
        raise UsageError(f"{option} {text}: there is no {unknown[0]}; expected {', '.join(known)}")
    if not parts:
        raise UsageError(f"{option} is empty; expected {', '.join(known)}")
    return parts
