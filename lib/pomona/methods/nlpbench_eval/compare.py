"""Runs side by side: paired tests on the same questions, corrected for how many there are."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pomona.errors import DataError, MissingError
from pomona.io.directory import read_results
from pomona.methods.nlpbench_eval.arms import Arm, Comparison
from pomona.methods.nlpbench_eval.scoring import cluster, counted
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
    pairs = [_pair(first, second, parser, seed) for first, second in itertools.combinations(arms, 2)]
    corrected = holm([pair.p_exact for pair in pairs])
    return [
        replace(pair, p_holm=p, verdict=_verdict(pair.first, pair.second, pair.difference, p))
        for pair, p in zip(pairs, corrected, strict=True)
    ]


def _pair(first: Arm, second: Arm, parser: str, seed: int) -> Comparison:
    """Two arms by themselves, not yet corrected for the others."""
    theirs = {a["id"]: a for a in second.answers}
    left, right, clusters = [], [], []
    for answer in first.answers:
        x, y = counted(answer, parser, "answered"), counted(theirs[answer["id"]], parser, "answered")
        if x is not None and y is not None:
            left.append(x)
            right.append(y)
            clusters.append(cluster(answer))
    outcomes = Counter(zip(left, right, strict=True))
    exact, mid = mcnemar(outcomes[1, 0], outcomes[0, 1])
    difference, low, high = paired_bootstrap(right, left, clusters, seed=seed) if left else (0.0, 0.0, 0.0)
    return Comparison(
        first=first.name,
        second=second.name,
        n=len(left),
        both=outcomes[1, 1],
        only_first=outcomes[1, 0],
        only_second=outcomes[0, 1],
        neither=outcomes[0, 0],
        difference=difference,
        low=low,
        high=high,
        p_exact=exact,
        p_mid=mid,
        p_holm=exact,
        verdict="",
    )


def _verdict(first: str, second: str, difference: float, p: float) -> str:
    if p >= LEVEL or difference == 0:
        return "not distinguishable"
    return f"{second} better than {first}" if difference > 0 else f"{first} better than {second}"
