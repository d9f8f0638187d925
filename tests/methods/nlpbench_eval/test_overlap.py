"""ROUGE-L and BLEU against their formulas, written out."""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.methods.nlpbench_eval.overlap import bleu, rouge_l, words

_sentences = st.lists(st.sampled_from("abcde"), max_size=14).map(" ".join)


def _common(first: list[str], second: list[str]) -> int:
    @cache
    def longest(i: int, j: int) -> int:
        if i == len(first) or j == len(second):
            return 0
        if first[i] == second[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


def test_rouge_l_of_the_specification_depends_on_which_is_the_candidate() -> None:
    assert round(rouge_l("a b c d", "a b"), 4) == 0.7093
    assert round(rouge_l("a b", "a b c d"), 4) == 0.6289


@settings(deadline=None)
@given(_sentences, _sentences, st.sampled_from([0.5, 1.0, 1.2, 8.0]))
def test_rouge_l_is_f_of_the_longest_common_subsequence(candidate: str, reference: str, beta: float) -> None:
    first, second = candidate.split(), reference.split()
    shared = _common(first, second)
    expected = 0.0
    if shared:
        precision, recall = shared / len(first), shared / len(second)
        expected = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert rouge_l(candidate, reference, beta) == pytest.approx(expected, rel=1e-12)


def test_rouge_l_takes_the_best_precision_and_recall_of_several_references() -> None:
    # P 1 from the first, R 1 from the second
    assert rouge_l("a b", ["a b c d", "a"]) == 1.0
    assert rouge_l("a b", ["a b c d", "x"]) == rouge_l("a b", "a b c d")


def test_overlap_ignores_case_and_punctuation() -> None:
    assert words("The cat, (sat)!") == ["the", "cat", "sat"]
    assert rouge_l("THE CAT.", "the cat") == bleu("THE CAT.", "the cat") == 1.0


@pytest.mark.parametrize(
    ("candidate", "references"), [("", "a"), ("a", ""), ("", ""), ("a", []), ("a b", "c d"), ("!", "!")]
)
def test_nothing_shared_scores_nothing(candidate: str, references: str | list[str]) -> None:
    assert rouge_l(candidate, references) == bleu(candidate, references) == 0.0


def _bleu(candidate: list[str], references: list[list[str]], n: int) -> float:
    precisions = []
    for order in range(1, min(n, len(candidate)) + 1):
        grams = [tuple(candidate[i : i + order]) for i in range(len(candidate) - order + 1)]
        clipped = 0
        for gram in set(grams):
            most = max(
                sum(tuple(reference[i : i + order]) == gram for i in range(len(reference) - order + 1))
                for reference in references
            )
            clipped += min(grams.count(gram), most)
        precisions.append((clipped + (order > 1)) / (len(grams) + (order > 1)))
    if not precisions or precisions[0] == 0:
        return 0.0
    closest = min((len(reference) for reference in references), key=lambda r: (abs(r - len(candidate)), r))
    penalty = 1.0 if len(candidate) >= closest else np.exp(1 - closest / len(candidate))
    return float(penalty * np.exp(np.mean(np.log(np.array(precisions, dtype=np.float64)))))


@settings(deadline=None)
@given(_sentences, st.lists(_sentences, min_size=1, max_size=3), st.integers(1, 4))
def test_bleu_is_its_formula(candidate: str, references: list[str], n: int) -> None:
    expected = _bleu(candidate.split(), [reference.split() for reference in references], n)
    assert bleu(candidate, references, n) == pytest.approx(expected, rel=1e-12)


def test_bleu_of_a_worked_example() -> None:
    # Unigrams 2/7 after clipping (Papineni et al., section 2.1); no bigram matches, so 1/7 after adding one.
    the = "the the the the the the the"
    assert bleu(the, ["The cat is on the mat", "There is a cat on the mat"], n=1) == pytest.approx(2 / 7)
    assert bleu(the, "The cat is on the mat", n=2) == pytest.approx((2 / 7 * 1 / 7) ** 0.5)


def test_bleu_punishes_brevity_against_the_nearest_reference() -> None:
    assert bleu("a b", ["a b c", "a b c d e f"], n=1) == pytest.approx(np.exp(1 - 3 / 2))
    assert bleu("a b", ["a", "a b c"], n=1) == 1.0  # equally near: the shorter


def test_long_answers_are_compared_quickly() -> None:
    random = np.random.default_rng(0)
    first, second = (" ".join(map(str, random.integers(0, 500, 20_000))) for _ in range(2))
    start = time.process_time()
    assert 0 < rouge_l(first, second) < 1
    assert time.process_time() - start < 5  # a table of 400 million cells takes minutes
