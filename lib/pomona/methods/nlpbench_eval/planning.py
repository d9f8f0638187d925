"""What a run will ask, fixed before it asks, and what that will take."""

from __future__ import annotations

from typing import Any

from pomona.errors import MissingError
from pomona.methods.nlpbench_eval import judging
from pomona.methods.nlpbench_eval.config import Config, names
from pomona.methods.nlpbench_eval.conversation import Method, Response, Strategy, drive
from pomona.methods.nlpbench_eval.dataset import Dataset
from pomona.methods.nlpbench_eval.oracle import Planner
from pomona.methods.nlpbench_eval.prompts import DEMONSTRATIONS, SYSTEM, Wording, read_shots, released_wording
from pomona.methods.nlpbench_eval.questions import TYPES
from pomona.methods.nlpbench_eval.released import THOUGHT_TOKENS
from pomona.methods.nlpbench_eval.strategies import converse
from pomona.runtime.settings import Settings

_SAMPLING = 0.7
"""Temperature at which several draws of the same thing differ; the profiles after the paper use its 1."""


def open_method(config: Config, settings: Settings) -> Method:
    """The method that the options describe: profile and strategy decide what is left unsaid.

    Raises:
        UsageError: a strategy that does not fit together.
        MissingError: a file of texts that cannot be read.
    """
    strategy = Strategy.parse(config.strategy)
    fixed, released = config.profile == "fixed", config.profile == "released"
    outer = (_SAMPLING if strategy.sc else 0.0) if fixed else 1.0
    inner = 1.0 if released else _SAMPLING if strategy.tot else 0.0
    return Method(
        strategy=strategy,
        wording=_wording(config, strategy),
        history=config.history,
        samples=config.samples,
        depth=config.tot_depth,
        branch=config.tot_branch,
        votes=config.tot_votes,
        beam=config.tot_beam,
        value=config.tot_eval == "value",
        temperature=outer if config.temperature is None else config.temperature,
        inner_temperature=inner if config.temperature_inner is None else config.temperature_inner,
        max_tokens=config.max_tokens,
        thought_tokens=config.thought_tokens or (512 if fixed else THOUGHT_TOKENS),
        seed=settings.seed,
        solutions=config.profile == "paper-text",
        released=released,
        quirks=frozenset(names(config.compat)),
    )


def _wording(config: Config, strategy: Strategy) -> Wording:
    if config.prompts is not None:
        return released_wording(
            config.prompts,
            few_shot=strategy.few_shot,
            reasoned=strategy.cot or strategy.tot,
            system=strategy.system,
        )
    shots = DEMONSTRATIONS if config.shot_file is None else read_shots(config.shot_file)
    shown = {kind: tuple(shots.get(kind, ()))[: config.shots] if strategy.few_shot else () for kind in TYPES}
    if config.profile == "released" and not strategy.few_shot:
        shown |= {kind: DEMONSTRATIONS[kind] for kind in ("mc", "math")}  # its zero-shot texts show the form this way
    system = SYSTEM if strategy.system else {}
    if config.system is not None:
        try:
            text = config.system.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise MissingError(
                f"--system {config.system}: {getattr(error, 'strerror', None) or 'not UTF-8'}"
            ) from error
        system = dict.fromkeys(TYPES, text)
    return Wording(
        shown,
        reasoned=strategy.cot,
        instructed=strategy.cot and config.profile != "released",
        system=system,
    )


def plan(dataset: Dataset, method: Method, config: Config) -> dict[str, Any]:
    """Calls, tokens and cost of a run from its beginning, found by having the conversations with a stand-in.

    Of prompt tokens an estimate, of completion tokens the most that can come back. `calls` holds where the model gives
    several samples a call, `calls_without_n` where it does not.
    """
    planner = Planner()
    shorts: list[Response] = []
    for turns in dataset.groups():
        responses = drive(converse(turns, method), planner.answer)
        shorts += [r for r in responses if r.question.type == "sa"]
    asked = planner.calls, planner.requests
    judged = bool(config.judge) and config.judge not in ("match", "human")
    if judged:
        for response in shorts:
            drive(judging.judge(response, "plan", released=True), planner.answer)
    margins = dataset.margins()
    entry: dict[str, Any] = {
        "questions": len(dataset.questions),
        "groups": sum(turns[0].group is not None for turns in dataset.groups()),
        "types": margins["type"],
        "context": margins["context"],
        "categories": margins["category"],
        "strategy": str(method.strategy),
        "calls": asked[0],
        "calls_without_n": asked[1],
        "judge_calls": len(shorts) if judged else 0,
        "prompt_tokens": planner.prompt_tokens,
        "completion_tokens": planner.completion_tokens,
        "cost": None,
        "data_sha256": dataset.sha256(),
    }
    if config.price_in is not None and config.price_out is not None:
        tokens = planner.prompt_tokens * config.price_in + planner.completion_tokens * config.price_out
        entry["cost"] = round(tokens / 1e6, 6)
    return entry
