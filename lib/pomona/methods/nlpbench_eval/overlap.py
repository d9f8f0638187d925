"""How far an answer's words are those of the reference: ROUGE-L (Lin 2004) and BLEU (Papineni et al. 2002)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The tokens that overlap is counted in: runs of letters, digits and underscores, in lower case."""
    return _WORD.findall(text.lower())


def rouge_l(candidate: str, references: str | Sequence[str], beta: float = 1.2) -> float:
    """F of the longest common subsequence, (1 + beta²) P R / (R + beta² P); 0 where nothing is shared.

    P is of the candidate's words, R of the reference's, so the two do not trade places: a short reference inside a long
    answer scores higher than the reverse. Of several references the best P and the best R count, as in the captioning
    code that made beta = 1.2 usual, even where they come from two of them.
    """
    answer = words(candidate)
    precision = recall = 0.0
    for reference in map(words, [references] if isinstance(references, str) else references):
        if shared := _common_length(answer, reference):
            precision = max(precision, shared / len(answer))
            recall = max(recall, shared / len(reference))
    if not precision:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def bleu(candidate: str, references: str | Sequence[str], n: int = 4) -> float:
    """Sentence BLEU: the geometric mean of clipped 1- to `n`-gram precisions times the brevity penalty.

    From 2-grams up one is added to matches and to total (Lin and Och 2004), or a short answer would nearly always score
    0. Orders longer than the candidate are left out of the mean. The penalty takes the reference nearest in length, of
    equals the shorter.
    """
    answer = words(candidate)
    known = [words(reference) for reference in ([references] if isinstance(references, str) else references)]
    if not answer or not known:
        return 0.0
    logs = []
    for order in range(1, min(n, len(answer)) + 1):
        most: Counter[tuple[str, ...]] = Counter()
        for reference in known:
            most |= _ngrams(reference, order)
        found = _ngrams(answer, order)
        matches, smooth = (found & most).total(), order > 1
        if not matches + smooth:
            return 0.0
        logs.append(math.log((matches + smooth) / (found.total() + smooth)))
    nearest = min((abs(len(reference) - len(answer)), len(reference)) for reference in known)[1]
    penalty = min(0.0, 1 - nearest / len(answer))
    return math.exp(penalty + sum(logs) / len(logs))


def _ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, each row of its table in the bits of one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, token in enumerate(second):
        places[token] = places.get(token, 0) | 1 << place
    row = full = (1 << len(second)) - 1
    for token in first:
        matched = row & places.get(token, 0)
        row = (row + matched | row - matched) & full
    return len(second) - row.bit_count()
