"""Published arithmetic on the embedded model: check A1, A2, and the reference script's own figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SEVEN = [
    ("Name the capital city of Norway.", "", "The capital city of Norway is Oslo."),
    ("Translate the sentence into French.", "The cat sleeps on the sofa.", "Le chat dort sur le canapé."),
    ("Is the following number even? Answer yes or no.", "17", "No"),
    ("Explain why the sky looks blue.", "", "Preheat the oven to 180 degrees, then fold the flour into the eggs."),
    ("Write a two-line poem about rain.", "", ") Soft rain taps the window pane,\nand the garden drinks again."),
    ("List three primary colours.", "", ""),
    ("Count upwards from one.", "", " ".join(map(str, range(1, 121)))),
]
RECORDS = [{"id": n, "instruction": i, "input": x, "output": o} for n, (i, x, o) in enumerate(SEVEN)]

# data-selection.md 8.1: an independent restatement of the three scripts, with a start token.
CHERRY_BOS = {
    0: (3.8292, 1.7111, 8, 0.4468),
    1: (6.2811, 4.5891, 10, 0.7306),
    2: (7.3476, 11.7839, 1, 1.6038),
    3: (2.5051, 3.3500, 19, 1.3373),
    6: (0.0621, 0.1018, 371, 1.6393),
}
REFLECTION_BOS = {
    0: (0.3315, 0.0317),
    1: (0.6337, 0.0705),
    2: (1.1052, 3.0699),
    3: (1.0973, 1.3457),
    6: (1.2207, 1.0186),
}
SUPERFILTER_BOS = {
    0: (5.1614, 1.0983, 0.0172),
    1: (7.2418, 4.1875, 0.0472),
    2: (10.6623, 3.0551, 0.0005),
    3: (3.0531, 2.7899, 0.7686),
    6: (0.0834, 0.0767, 0.9933),
}
# The same page: Cherry's data_analysis.py itself, whose tokenizer gives no start token.
CHERRY_SCRIPT = {
    0: (3.1725, 1.7975, 0.5666),
    1: (6.3332, 4.6191, 0.7293),
    2: (8.7122, 12.3462, 1.4171),
    3: (2.7406, 3.3303, 1.2152),
    6: (0.0814, 0.0991, 1.2180),
}


@pytest.fixture
def score(ifd: Callable[..., Any], embedded: str) -> Callable[..., list[dict[str, Any]]]:
    """Score records with the embedded model."""

    def run(records: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = ifd(records, model=embedded, **options).records
        return found

    return run


def loss(value: float) -> Any:
    return pytest.approx(value, abs=5e-4)


def ratio(value: float) -> Any:
    return pytest.approx(value, rel=0.01, abs=1e-4)


def by_number(found: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {record["id"]: record["ifd"] for record in found}


def test_a1_and_a2_cherry_with_start_token(score: Callable[..., Any]) -> None:
    scored = score(RECORDS, variant="cherry", bos="add")
    found = by_number(scored)
    for number, (direct, conditioned, tokens, ifd) in CHERRY_BOS.items():
        entry = found[number]
        assert (entry["loss_direct"], entry["loss_cond"], entry["ifd"]) == (loss(direct), loss(conditioned), ratio(ifd))
        assert entry["n_answer"] == entry["n_direct"] == tokens
    assert found[5]["status"] == "empty_answer" and found[5]["ifd"] is None
    assert [r["id"] for r in score(scored, variant="cherry", keep_top="100%")] == [0, 1, 4]


def test_a1_and_a2_superfilter_with_start_token(score: Callable[..., Any]) -> None:
    scored = score(RECORDS, bos="add")
    found = by_number(scored)
    for number, (direct, conditioned, ifd) in SUPERFILTER_BOS.items():
        entry = found[number]
        assert (entry["loss_direct"], entry["loss_cond"], entry["ifd"]) == (loss(direct), loss(conditioned), ratio(ifd))
    kept = score(scored, keep_top="100%")
    assert sorted(r["id"] for r in kept) == [0, 1, 2, 3, 6]
    assert [r["ifd"]["rank"] for r in kept] == [1, 2, 3, 4, 5]
    assert [r["ifd"]["ifd"] for r in kept] == sorted((r["ifd"]["ifd"] for r in kept), reverse=True)


def test_a1_reflection_with_start_token(score: Callable[..., Any]) -> None:
    found = by_number(score(RECORDS, variant="reflection", bos="add"))
    for number, (by_loss, by_ppl) in REFLECTION_BOS.items():
        assert (found[number]["ifd_loss"], found[number]["ifd_ppl"]) == (ratio(by_loss), ratio(by_ppl))
        assert found[number]["ifd"] == found[number]["ifd_ppl"]


def test_a1_the_reference_scripts_own_figures(score: Callable[..., Any]) -> None:
    found = by_number(score(RECORDS, variant="cherry", bos="none", template="alpaca", max_length=512))
    for number, (direct, conditioned, ifd) in CHERRY_SCRIPT.items():
        entry = found[number]
        assert (entry["loss_direct"], entry["loss_cond"], entry["ifd"]) == (loss(direct), loss(conditioned), ratio(ifd))


@pytest.mark.slow
def test_golden_first_records_of_random_9k(score: Callable[..., Any], shared: Callable[[str], Path]) -> None:
    golden = json.loads(shared("golden/ifd_cherry_smollm2.json").read_text())["records"]
    records = json.loads(shared("data/alpaca/random_9k.json").read_text())[: len(golden)]
    found = score(records, variant="cherry", bos="none", template="alpaca", max_length=512)
    for expected, record in zip(golden, found, strict=True):
        entry = record["ifd"]
        assert entry["loss_direct"] == loss(expected["loss_direct"])
        assert entry["loss_cond"] == loss(expected["loss_cond"])
        assert entry["ifd"] == pytest.approx(expected["ifd"], rel=1e-3)


@pytest.mark.slow
def test_a6_bfloat16_ranks_as_float32_does(score: Callable[..., Any], shared: Callable[[str], Path]) -> None:
    from scipy.stats import spearmanr

    records = json.loads(shared("data/alpaca/random_9k.json").read_text())[:40]
    exact, short = ([r["ifd"]["ifd"] for r in score(records, bos="add", dtype=d)] for d in ("float32", "bfloat16"))
    assert spearmanr(exact, short).statistic >= 0.995
