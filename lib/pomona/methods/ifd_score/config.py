"""The options of `pomona ifd-score`, and the three published variants they start from."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from pomona.errors import UsageError
from pomona.runtime.ranges import positive

Variant = Literal["cherry", "reflection", "superfilter"]
Ratio = Literal["loss", "ppl"]
Bos = Literal["auto", "add", "none"]
Boundary = Literal["text", "token"]
Eos = Literal["score", "ignore"]
Turns = Literal["last", "each", "mean"]
OnTruncate = Literal["score", "drop"]
Order = Literal["source", "score"]

MIN_LENGTH = 8
TEMPLATES = ("alpaca", "wizardlm", "wizardlm-v2", "vicuna", "plain", "chat")


@dataclass(frozen=True)
class Config:
    """What is scored and how, and which records are kept."""

    variant: Annotated[
        Variant, "published version: cherry (2308.12032), reflection (2402.10110) or superfilter (2402.00530)"
    ] = "superfilter"
    ratio: Annotated[
        Ratio | None, "what `ifd` holds: ratio of losses (Eq. 5) or of perplexities; default by variant"
    ] = None
    template: Annotated[
        str | None,
        "prompt: alpaca, wizardlm, wizardlm-v2, vicuna, plain, chat (the model's own), or a text file with "
        "{instruction} and {input}, where a second text after a line --- serves records without input; default by "
        "variant",
    ] = None
    direct_prefix: Annotated[
        str | None, "text before the answer in the direct pass; default: the template's answer mark (cherry) or nothing"
    ] = None
    max_length: Annotated[
        int | None, "cut after this many tokens; default cherry 512 (wizardlm 1024), reflection 2048, superfilter 1024"
    ] = None
    bos: Annotated[Bos, "start-of-text token: as the tokenizer does, always one, or none"] = "auto"
    boundary: Annotated[
        Boundary, "where the answer starts: after as many tokens as the prompt has alone, or encoded apart and joined"
    ] = "text"
    eos: Annotated[Eos, "count the end-of-text token as part of the answer, or leave it out (as published)"] = "ignore"
    turns: Annotated[Turns, "conversations: score the last answer, each one (adds ifd_turns), or their mean"] = "last"
    reverse: Annotated[bool, "r-IFD: score the instruction given the answer; the result goes under ifd.reverse"] = False
    on_truncate: Annotated[
        OnTruncate, "an answer cut at the length: score what is left (as published), or leave it"
    ] = "score"
    keep_top: Annotated[str | None, "keep the records with the highest score: P% of the base, or N"] = None
    min_ifd: Annotated[float | None, "keep records that score at least this"] = None
    max_ifd: Annotated[
        float | None, "keep records that score at most this; default: at most 1 (cherry) or below 1, when selecting"
    ] = None
    rate_base: Annotated[
        str | None, "what P% is taken of: all, eligible or a number of records; default eligible for cherry, else all"
    ] = None
    order: Annotated[
        Order | None, "order of the selected records: as in the source, or highest score first; default by variant"
    ] = None
    rescore: Annotated[bool, "score records again that carry a score already"] = False
    experience: Annotated[
        Path | None,
        "pre-experience (paper section 2.1): train the brief model into this directory, or reuse it, and score with it",
    ] = None
    clusters: Annotated[int, "pre-experience: k-means clusters of the instructions"] = 100
    per_cluster: Annotated[int, "pre-experience: records taken from each cluster"] = 10
    ppl_band: Annotated[str, "pre-experience: percentiles of a cluster's perplexity to stay in, LOW:HIGH"] = "25:75"
    learning_rate: Annotated[float, "pre-experience: peak learning rate of its one epoch"] = 2e-5
    train_batch: Annotated[int, "pre-experience: records per optimiser step"] = 128
    adapter: Annotated[Path | None, "a PEFT adapter directory to put on the model"] = None
    gguf_file: Annotated[str | None, "the GGUF file inside the model directory"] = None
    revision: Annotated[str | None, "revision of a hub model"] = None
    tokens_per_batch: Annotated[str, "tokens in one forward pass, padding counted; auto goes by the device"] = "auto"
    sort_window: Annotated[int, "records sorted by length together; the window grows to this"] = 2048
    chunk_rows: Annotated[int, "answer positions that go through the output layer at once; bounds memory"] = 2048

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < MIN_LENGTH:
            raise UsageError(f"--max-length {self.max_length}: it must be {MIN_LENGTH} tokens or more")
        for name in ("clusters", "per_cluster", "train_batch", "sort_window", "chunk_rows"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(self, name)}")
        positive(self, "learning_rate")
        for name in ("min_ifd", "max_ifd"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UsageError(f"--{name.replace('_', '-')} must be a number, not {value}")
        if self.experience is not None and self.adapter is not None:
            raise UsageError("--experience and --adapter exclude each other", hint="merge the adapter first")
        _ = self.band, self.token_budget
        keep_rule(self.keep_top)
        base_rule(self.rate_base)

    @property
    def selects(self) -> bool:
        """Whether records are left out at all."""
        return not (self.keep_top is None and self.min_ifd is None and self.max_ifd is None)

    @property
    def band(self) -> tuple[float, float]:
        """Percentiles of `ppl_band` (UsageError if it is not LOW:HIGH)."""
        low, _, high = self.ppl_band.partition(":")
        try:
            band = float(low), float(high)
        except ValueError:
            band = math.nan, math.nan
        if not 0 <= band[0] < band[1] <= 100:
            raise UsageError(f"--ppl-band {self.ppl_band}: expected LOW:HIGH in percent, e.g. 25:75")
        return band

    @property
    def token_budget(self) -> int | None:
        """`tokens_per_batch` as a number; None for auto (UsageError if it is neither)."""
        if self.tokens_per_batch == "auto":
            return None
        if not self.tokens_per_batch.isdecimal() or int(self.tokens_per_batch) < 1:
            raise UsageError(f"--tokens-per-batch {self.tokens_per_batch}: expected auto or a number of tokens")
        return int(self.tokens_per_batch)


@dataclass(frozen=True)
class Recipe:
    """A variant with every override applied.

    `cut` is the highest score that selection keeps; `strict` leaves out the cut itself. `over_length` marks answers
    that the reference drops because prompt and direct answer together exceed the length. `late_ties` prefers the later
    of two equal scores.
    """

    ratio: Ratio
    template: str
    direct_prefix: str | None
    max_length: int
    bos: Bos
    boundary: Boundary
    eos: Eos
    turns: Turns
    reverse: bool
    on_truncate: OnTruncate
    over_length: bool
    cut: float
    strict: bool
    rate_base: str
    order: Order
    late_ties: bool


def resolve(config: Config) -> Recipe:
    """`config` with "as the variant says" filled in; a None `direct_prefix` means the template's own answer mark."""
    cherry = config.variant == "cherry"
    template = config.template or ("plain" if config.variant == "superfilter" else "alpaca")
    length = {"cherry": 1024 if template.startswith("wizardlm") else 512, "reflection": 2048, "superfilter": 1024}
    return Recipe(
        ratio=config.ratio or ("loss" if cherry else "ppl"),
        template=template,
        direct_prefix=config.direct_prefix if config.direct_prefix is not None else (None if cherry else ""),
        max_length=config.max_length or length[config.variant],
        bos=config.bos,
        boundary=config.boundary,
        eos=config.eos,
        turns=config.turns,
        reverse=config.reverse,
        on_truncate=config.on_truncate,
        over_length=cherry,
        cut=1.0 if config.max_ifd is None else config.max_ifd,
        strict=config.max_ifd is None and not cherry,
        rate_base=config.rate_base or ("eligible" if cherry else "all"),
        order=config.order or ("score" if config.variant == "superfilter" else "source"),
        late_ties=cherry,
    )


def keep_rule(text: str | None) -> Fraction | int | None:
    """``"5%"`` as an exact fraction, ``"300"`` as a count, None for no limit (UsageError otherwise)."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%|([0-9]+)", text.strip())
    if found is None or (found[1] and Fraction(found[1]) > 100):
        raise UsageError(f"--keep-top {text}: expected a share such as 5% or a count such as 300")
    return Fraction(found[1]) / 100 if found[1] else int(found[2])


def base_rule(text: str | None) -> Literal["all", "eligible"] | int | None:
    """``--rate-base`` as a word or a number of records (UsageError otherwise)."""
    if text is None or text in ("all", "eligible"):
        return text  # type: ignore[return-value]
    if not text.isdecimal():
        raise UsageError(f"--rate-base {text}: expected all, eligible or a number of records")
    return int(text)
