"""Runs side by side: paired tests on the same questions, corrected for how many there are."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pomona.errors import DataError, MissingError
from pomona.io.directory import read_results
from pomona.methods.nlpbench_eval.arms import Arm, Comparison
from pomona.methods.nlpbench_eval.scoring import counted
from pomona.methods.nlpbench_eval.statistics import holm, mcnemar, paired_bootstrap

LEVEL = 0.05
"""Of the test, after Holm's correction over all pairs."""


def read_arms(folders: Sequence[str], *, intersect: bool) -> list[Arm]:
    """The runs in `folders`, with names that tell them apart.

    Args:
        intersect: accept runs on different data and keep the questions they share.

    Raises:
        MissingError: a folder is no finished run.
        DataError: the runs are on different data, or share no question.
    """
    arms = [_read(Path(folder), name) for folder, name in zip(folders, _names(folders), strict=True)]
    digests = {arm.result["data"]["sha256"] for arm in arms}
    if len(digests) > 1 and not intersect:
        odd = next(arm for arm in arms if arm.result["data"]["sha256"] != arms[0].result["data"]["sha256"])
        raise DataError(
            f"{arms[0].name} and {odd.name} are runs on different questions",
            hint="--intersect compares the questions they share",
        )
    shared = set.intersection(*({_identity(a) for a in arm.answers} for arm in arms))
    if not shared:
        raise DataError("the runs share no question")
    return [Arm(arm.name, arm.result, [a for a in arm.answers if _identity(a) in shared]) for arm in arms]


def _identity(answer: Mapping[str, Any]) -> str:
    return json.dumps([answer["id"], answer["type"], answer["question"], answer["gold"]])


def _read(folder: Path, name: str) -> Arm:
    try:
        result = json.loads(read_results(folder, "result.json"))
        answers = [json.loads(line) for line in read_results(folder, "answers.jsonl").splitlines()]
        return Arm(name, {**result, "data": dict(result["data"])}, answers)
    except (ValueError, KeyError, TypeError) as error:
        raise MissingError(f"{folder}: result.json or answers.jsonl is damaged") from error


def _names(folders: Sequence[str]) -> list[str]:
    """The last part of each path or, where that does not tell them apart, the whole path."""
    short = [Path(folder).resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(Path(folder)) for folder in folders]


def compare(arms: Sequence[Arm], parser: str, *, seed: int) -> list[Comparison]:
    """Every pair of `arms` on the questions that both answered."""
    pairs = []
    for first, second in itertools.combinations(arms, 2):
        theirs = {a["id"]: a for a in second.answers}
        both = [(a, theirs[a["id"]]) for a in first.answers]
        known = [
            (x, y, a)
            for a, b in both
            if (x := counted(a, parser, "answered")) is not None and (y := counted(b, parser, "answered")) is not None
        ]
        left, right = [x for x, _, _ in known], [y for _, y, _ in known]
        clusters = [f"g {a['group']}" if a["group"] is not None else f"q {a['id']}" for _, _, a in known]
        only_first = sum(x > y for x, y in zip(left, right, strict=True))
        only_second = sum(y > x for x, y in zip(left, right, strict=True))
        exact, mid = mcnemar(only_first, only_second)
        difference, low, high = paired_bootstrap(right, left, clusters, seed=seed) if known else (0.0, 0.0, 0.0)
        pairs.append((first, second, left, right, only_first, only_second, difference, low, high, exact, mid))
    corrected = holm([pair[-2] for pair in pairs])
    return [
        Comparison(
            first=first.name,
            second=second.name,
            n=len(left),
            both=sum(x and y for x, y in zip(left, right, strict=True)),
            only_first=only_first,
            only_second=only_second,
            neither=sum(not x and not y for x, y in zip(left, right, strict=True)),
            difference=difference,
            low=low,
            high=high,
            p_exact=exact,
            p_mid=mid,
            p_holm=p,
            verdict=_verdict(first.name, second.name, difference, p),
        )
        for (first, second, left, right, only_first, only_second, difference, low, high, exact, mid), p in zip(
            pairs, corrected, strict=True
        )
    ]


def _verdict(first: str, second: str, difference: float, p: float) -> str:
    if p >= LEVEL or difference == 0:
        return "not distinguishable"
    return f"{second} better than {first}" if difference > 0 else f"{first} better than {second}"
