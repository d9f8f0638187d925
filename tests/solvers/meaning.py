"""Logic and meaning, retrieval and topics."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from solvers import Question, matching, numbers, solves, verdict

# --- logic and meaning ------------------------------------------------------------------------------------------------


def world(q: Question) -> dict[str, set[Any]]:
    sets: dict[str, set[Any]] = {}
    for name, members in re.findall(r"^(\w+) = \{(.+)\}$", q["context"], re.M):
        pairs = re.findall(r"\((\w), (\w)\)", members)
        sets[name] = set(pairs) if pairs else set(members.split(", "))
    return sets


def readings(student: set[str], book: set[str], read: set[Any]) -> tuple[bool, bool]:
    """Every student over a book; a book over every student."""
    return (
        all(any((x, y) in read for y in book) for x in student),
        any(all((x, y) in read for x in student) for y in book),
    )


@solves("fol-model-1")
def _(q: Question) -> Any:
    m, domain = world(q), "abcd"
    wide, narrow = readings(m["student"], m["book"], m["read"])
    truths = {
        r"$\forall x (student(x) \to \exists y (book(y) \land read(x, y)))$": wide,
        r"$\exists y (book(y) \land \forall x (student(x) \to read(x, y)))$": narrow,
        r"$\forall x \forall y (read(x, y) \to liked(x, y))$": m["read"] <= m["liked"],
        r"$\forall x \forall y (liked(x, y) \to read(x, y))$": m["liked"] <= m["read"],
        r"$\exists x (student(x) \land \neg \exists y\, liked(x, y))$": any(
            all((x, y) not in m["liked"] for y in domain) for x in m["student"]
        ),
    }
    return matching(q, truths.__getitem__)


@solves("fol-model-2")
def _(q: Question) -> Any:
    m = world(q)
    names = {
        (True, True): "Both readings",
        (False, False): "Neither reading",
        (True, False): "Only the reading with 'every student' over 'a book'",
        (False, True): "Only the reading with 'a book' over 'every student'",
    }
    return matching(q, lambda option: option == names[readings(m["student"], m["book"], m["read"])])


@solves("fol-model-3")
def _(q: Question) -> Any:
    m = world(q)
    new = [pair for pair in itertools.product("abcd", repeat=2) if pair not in m["read"]]
    enough = [pair for pair in new if all(readings(m["student"], m["book"], m["read"] | {pair}))]
    return " and ".join(f"({x}, {y})" for x, y in enough)


@solves("fol-negation")
def _(q: Question) -> Any:
    formulas: dict[str, Callable[[list[tuple[bool, bool]]], bool]] = {
        r"$\exists x (P(x) \land \neg Q(x))$": lambda things: any(p and not q for p, q in things),
        r"$\forall x (P(x) \to \neg Q(x))$": lambda things: all(not p or not q for p, q in things),
        r"$\exists x (P(x) \to \neg Q(x))$": lambda things: any(not p or not q for p, q in things),
        r"$\forall x (\neg P(x) \to \neg Q(x))$": lambda things: all(p or not q for p, q in things),
        r"$\neg \exists x (P(x) \land Q(x))$": lambda things: not any(p and q for p, q in things),
    }
    kinds = list(itertools.product((True, False), repeat=2))
    models = [list(things) for size in (1, 2, 3) for things in itertools.product(kinds, repeat=size)]
    goal = [not all(not p or q for p, q in things) for things in models]
    return matching(q, lambda option: [formulas[option](things) for things in models] == goal)


@solves("monotone-determiners")
def _(q: Question) -> Any:
    determiners: dict[str, Callable[[int, int], bool]] = {  # of the cats that purr and the cats
        "no": lambda purring, cats: purring == 0,
        "some": lambda purring, cats: purring >= 1,
        "every": lambda purring, cats: purring == cats,
        "at most three": lambda purring, cats: purring <= 3,
        "most": lambda purring, cats: 2 * purring > cats,
    }

    def downward(option: str) -> bool:
        holds = determiners[option]
        return all(
            holds(black_purring, black)
            for cats in range(9)
            for purring in range(cats + 1)
            if holds(purring, cats)
            for black_purring in range(purring + 1)
            for black in range(black_purring, black_purring + cats - purring + 1)
        )

    return matching(q, downward)


@solves("type-determiner")
def _(q: Question) -> Any:
    def applied(function: str, argument: str) -> str | None:
        start = f"<{argument},"
        return function[len(start) : -1] if function.startswith(start) else None

    return matching(q, lambda option: applied(applied(option, "<e,t>") or "", "<e,t>") == "t")


@solves("lesk")
def _(q: Question) -> Any:
    ignored = set(re.findall(r"function words (.+?) are", q["question"])[0].split(", "))
    told, *glosses = (set(text.lower().split()) - ignored for text in re.findall(r"'(.+?)'", q["question"]))
    overlaps = [len(told & gloss) for gloss in glosses]
    assert len(set(overlaps)) == 2
    return f"sense {1 + overlaps.index(max(overlaps))}"


@solves("pmi")
def _(q: Question) -> Any:
    total, w, c, both = numbers(q["question"])[:4]
    return math.log2(both * total / (w * c))


# --- retrieval and topics ---------------------------------------------------------------------------------------------


def cosines(q: Question, *, log: Callable[[Any], Any] = np.log2) -> tuple[np.ndarray, np.ndarray]:
    """Cosine of each two documents, and of each document with the query."""
    counts = {
        term: numbers(re.sub(r"d\d ", "", row)) for term, row in re.findall(r"^(\w+): (d1.+)$", q["context"], re.M)
    }
    raw = np.array(list(counts.values()))
    idf = log(raw.shape[1] / (raw > 0).sum(1))
    query = np.array([term in ("bank", "loan") for term in counts]) * idf
    columns = np.column_stack([raw * idf[:, None], query])
    columns = columns / np.linalg.norm(columns, axis=0)
    products = columns.T @ columns
    return products[:-1, :-1], products[-1, :-1]


@solves("tfidf-1")
def _(q: Question) -> Any:
    return cosines(q)[0][0, 1]


@solves("tfidf-2")
def _(q: Question) -> Any:
    return verdict(not np.allclose(cosines(q)[0], cosines(q, log=np.log)[0]))


@solves("tfidf-3")
def _(q: Question) -> Any:
    scores = cosines(q)[1]
    assert len(set(scores.round(9))) == 4, "no tie"
    return ", ".join(f"d{1 + i}" for i in np.argsort(-scores))


@solves("tfidf-4")
def _(q: Question) -> Any:
    hits = [i in (0, 1) for i in np.argsort(-cosines(q)[1])]
    precisions = [sum(hits[: k + 1]) / (k + 1) for k, hit in enumerate(hits) if hit]
    return sum(precisions) / len(precisions)


def topic(q: Question, document: list[int], word: list[int], total: list[int]) -> float:
    """The collapsed Gibbs conditional of topic 1 (Griffiths and Steyvers, 2004)."""
    topics, types, alpha, beta = (
        int(re.findall(rf"\b{name} = (\d+)", q["context"])[0]) for name in ("K", "V", "alpha", "beta")
    )
    weights = [
        (document[k] + alpha) / (sum(document) + topics * alpha) * (word[k] + beta) / (total[k] + types * beta)
        for k in range(topics)
    ]
    return weights[0] / sum(weights)


def counts_by_topic(q: Question) -> list[list[int]]:
    return [[int(a), int(b)] for a, b in re.findall(r"topic 1 has (\d+), topic 2 has (\d+)", q["context"])]


@solves("lda-gibbs-1")
def _(q: Question) -> Any:
    return topic(q, *counts_by_topic(q))


@solves("lda-gibbs-2")
def _(q: Question) -> Any:
    (d1, d2), (w1, w2), (n1, n2) = counts_by_topic(q)
    after = {
        "One more token of document d in topic 2": ([d1, d2 + 1], [w1, w2], [n1, n2]),
        "One more token of w in topic 1, so that all tokens in topic 1 also rise by one": (
            [d1, d2],
            [w1 + 1, w2],
            [n1 + 1, n2],
        ),
        "One more token of w in topic 2, so that all tokens in topic 2 also rise by one": (
            [d1, d2],
            [w1, w2 + 1],
            [n1, n2 + 1],
        ),
        "Four more tokens of other words in topic 2, from other documents": ([d1, d2], [w1, w2], [n1, n2 + 4]),
    }
    before = topic(q, *counts_by_topic(q))
    return matching(q, lambda option: topic(q, *after[option]) > before)


@solves("pagerank")
def _(q: Question) -> Any:
    links = np.zeros((3, 3))
    for page, others in re.findall(r"([ABC]) links (to [^;.]+)[;.]", q["question"]):
        onto = ["ABC".index(other) for other in re.findall(r"to ([ABC])", others)]
        links["ABC".index(page), onto] = 1 / len(onto)
    assert np.allclose(links.sum(1), 1)
    damping = float(re.findall(r"damping factor is ([\d.]+)", q["question"])[0])
    scores = np.full(3, 1 / 3)
    for _step in range(500):
        scores = (1 - damping) / 3 + damping * scores @ links
    return scores[0]


@solves("bm25-saturation")
def _(q: Question) -> Any:
    k1 = numbers(q["question"])[0]
    return verdict(any(f * (k1 + 1) / (f + k1) > k1 + 1 for f in np.logspace(0, 12)))


@solves("postings-merge")
def _(q: Question) -> Any:
    def worst(m: int, n: int) -> int:
        if not m or not n:
            return 0
        return 1 + max(worst(m - 1, n), worst(m, n - 1))

    growth: dict[str, Callable[[int, int], float]] = {
        r"$\Theta(\min(m, n))$": min,
        r"$\Theta(m + n)$": lambda m, n: m + n,
        r"$\Theta(m n)$": lambda m, n: m * n,
        r"$\Theta(\log(m + n))$": lambda m, n: math.log(m + n),
    }
    worst = cache(worst)
    sizes = [(1, 2), (3, 3), (3, 90), (60, 3), (60, 60)]
    return matching(q, lambda option: all(0.5 <= worst(m, n) / growth[option](m, n) <= 1 for m, n in sizes))
