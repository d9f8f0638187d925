"""The options of `pomona nlpbench-eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pomona.errors import UsageError
from pomona.models.options import EndpointOptions
from pomona.runtime.ranges import at_least

QUIRKS = ("tot-temperature", "thought-limit")


@dataclass(frozen=True)
class Config(EndpointOptions):
    """What is asked and how, who judges, and which figures head the tables."""

    strategy: Annotated[
        str,
        "zs or fs (zero-shot, few-shot), with cot, sys, sc, or with tot, sys, joined by + as in fs+cot+sc (paper 3.2)",
    ] = "zs"
    profile: Annotated[
        Literal["fixed", "paper-text", "released"],
        "fixed: as one would do it; paper-text: as the paper says; released: as its code does, faults included",
    ] = "fixed"
    compat: Annotated[str | None, f"further faults of the released code, by comma: {', '.join(QUIRKS)}"] = None
    prompts: Annotated[Path | None, "use the texts of this prompts/ folder of the released code (read, never run)"] = (
        None
    )
    shots: Annotated[int, "demonstrations per question type with fs; more than 3 need --shot-file"] = 3
    shot_file: Annotated[Path | None, "demonstrations as JSONL: type, question, options, answer, thought"] = None
    system: Annotated[Path | None, "the system message, from a text file, instead of one by question type"] = None
    history: Annotated[
        Literal["own", "gold", "none"], "what later questions of a group see: own answers, gold answers, or nothing"
    ] = "own"
    samples: Annotated[int, "draws per multiple-choice question with sc"] = 3
    tot_depth: Annotated[int, "thoughts on the way to an answer with tot"] = 2
    tot_branch: Annotated[int, "thoughts tried from each state"] = 3
    tot_votes: Annotated[int, "votes at each level, or values for each candidate"] = 3
    tot_beam: Annotated[int, "states kept at each level"] = 2
    tot_eval: Annotated[Literal["vote", "value"], "compare the candidates, or value each from 0 to 1"] = "vote"
    temperature: Annotated[
        float | None, "of answers; by default 0 (0.7 with sc), or the paper's 1 outside the profile fixed"
    ] = None
    temperature_inner: Annotated[
        float | None, "of thoughts and votes; by default 0 (0.7 with tot), 1 in the profile released"
    ] = None
    max_tokens: Annotated[int, "most tokens of an answer (released: 945)"] = 945
    thought_tokens: Annotated[int | None, "most tokens of a thought or vote; by default 512, outside fixed 128"] = None
    types: Annotated[str | None, "ask only these question types, by comma: mc, sa, math"] = None
    categories: Annotated[str | None, "ask only these categories, by comma: lmsp, ai, sl, irtm, pdda, ot"] = None
    context: Annotated[Literal["all", "with", "without"], "ask only questions with, or without, a context"] = "all"
    ids: Annotated[Path | None, "ask only the questions whose ids are in this file, one a line"] = None
    other_categories: Annotated[bool, "accept categories besides the six of the paper"] = False
    expect_official: Annotated[bool, "fail (exit 4) unless the data has the official counts (paper table 1)"] = False
    judge: Annotated[
        str | None,
        "who judges short answers: openai:NAME, a local model, match (equals an accepted form), or human; by default "
        "nobody, and they stay unscored",
    ] = None
    judge_base_url: Annotated[str | None, "address of the judge's endpoint; by default --base-url"] = None
    verdicts: Annotated[
        Path | None,
        "a person's verdicts as CSV (id, verdict); with --judge human the run writes verdicts.csv to fill in",
    ] = None
    parser: Annotated[
        Literal["lenient", "strict"], "which reading of a reply heads the tables; both are always there"
    ] = "lenient"
    missing: Annotated[
        Literal["exclude", "wrong"], "unanswered questions in the headline: left out, or wrong as in the paper"
    ] = "exclude"
    fail_under: Annotated[float | None, "fail (exit 9) when the headline accuracy is below this, from 0 to 1"] = None
    redact: Annotated[
        Literal["text"] | None, "keep all question and reply texts out of the run directory: hashes instead"
    ] = None
    show_prompts: Annotated[bool, "print the conversations each group begins with as JSONL, ask nothing"] = False
    compare: Annotated[bool, "the arguments are run directories: compare them pairwise on the same questions"] = False
    intersect: Annotated[
        bool, "with --compare: accept runs on different data, and compare the questions they share"
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = ("samples", "tot_depth", "tot_branch", "tot_votes", "tot_beam", "max_tokens", "thought_tokens")
        at_least(self, 1, *whole)
        for name in ("temperature", "temperature_inner"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 100:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be 0 or more")
        if self.shots < 0 or (self.shots > 3 and self.shot_file is None):
            raise UsageError(f"--shots {self.shots}: there are 3 for each type", hint="--shot-file brings more")
        if self.fail_under is not None and not 0 <= self.fail_under <= 1:
            raise UsageError(f"--fail-under is {self.fail_under}; it must be from 0 to 1")
        if self.profile != "released" and (self.compat or self.prompts):
            raise UsageError("--compat and --prompts go with --profile released")
        if unknown := sorted(set(names(self.compat)) - set(QUIRKS)):
            raise UsageError(f"--compat {unknown[0]}: expected {' or '.join(QUIRKS)}")
        if unknown := sorted(set(names(self.types)) - {"mc", "sa", "math"}):
            raise UsageError(f"--types {unknown[0]}: expected mc, sa or math")
        if self.judge is not None and (self.judge in ("", "openai:", "local:") or self.judge.startswith("mock:")):
            raise UsageError(f"--judge {self.judge!r}: expected openai:NAME, a local model, match or human")
        if self.judge == "human" and self.redact:
            raise UsageError("--judge human writes the answers to verdicts.csv, which --redact text forbids")


def names(text: str | None) -> tuple[str, ...]:
    """The parts of a list by comma."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
