"""Classifiers, networks, tagging and evaluation."""

from __future__ import annotations

import itertools
import math
import re
from functools import cache
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score
from sklearn.naive_bayes import MultinomialNB

from solvers import Question, matching, numbers, solves, verdict

# --- classifiers and networks -----------------------------------------------------------------------------------------


def labels(q: Question) -> tuple[list[str], list[str]]:
    gold, predicted = [], []
    for row in re.findall(r"^gold (.+)$", q["context"], re.M):
        name, _, cells = row.partition(": ")
        for column, count in re.findall(r"(\w+) (\d+)", cells):
            gold += [name] * int(count)
            predicted += [column] * int(count)
    assert f"each of {len(gold)} texts" in q["context"]
    return gold, predicted


@solves("confusion-1")
def _(q: Question) -> Any:
    return f1_score(*labels(q), average=None, labels=["neutral"])[0]


@solves("confusion-2")
def _(q: Question) -> Any:
    return f1_score(*labels(q), average="macro")


@solves("confusion-3")
def _(q: Question) -> Any:
    micro = f1_score(*labels(q), average="micro")
    return verdict(math.isclose(micro, accuracy_score(*labels(q))) and math.isclose(micro, numbers(q["question"])[-1]))


def attend(q: Question, *, scaled: bool = True) -> tuple[np.ndarray, np.ndarray]:
    named = {n: np.array(numbers(v)) for n, v in re.findall(r"(\w+) = \(([^)]+)\)", q["context"])}
    keys, values = (np.stack([named[f"{kind}{i}"] for i in (1, 2, 3)]) for kind in "kv")
    dimension = int(re.findall(r"keys of dimension (\d+)", q["context"])[0])
    assert keys.shape == (3, dimension)
    weights = np.exp(keys @ named["q"] / (dimension**0.5 if scaled else 1))
    weights /= weights.sum()
    return weights, weights @ values


@solves("attention-1")
def _(q: Question) -> Any:
    return attend(q)[0][0]


@solves("attention-2")
def _(q: Question) -> Any:
    return attend(q)[1][0]


@solves("attention-3")
def _(q: Question) -> Any:
    before, after = attend(q)[0][0], attend(q, scaled=False)[0][0]
    assert after > before
    return matching(q, lambda option: option == f"It rises to about {after:.3f}.")


@solves("naive-bayes-1")
def _(q: Question) -> Any:
    return spam(q, "cash now team")


def spam(q: Question, message: str, smoothing: float = 1.0) -> float:
    rows = dict(re.findall(r"^Word counts in (\w+): (.+)$", q["context"], re.M))
    vocabulary = re.findall(r"([a-z]+) \d", rows["spam"])
    assert f"({len(vocabulary)} types)" in q["context"]
    counts = np.array([numbers(rows[name]) for name in ("spam", "ham")])
    priors = np.array([float(re.findall(rf"(\d+) {name} messages", q["context"])[0]) for name in ("spam", "ham")])
    model = MultinomialNB(alpha=smoothing, class_prior=priors / priors.sum(), force_alpha=True)
    model.fit(counts, ["a", "b"])
    return model.predict_proba([[message.split().count(w) for w in vocabulary]])[0][0]


@solves("naive-bayes-3")
def _(q: Question) -> Any:
    one, other = re.findall(r"'([^']+)'", q["question"])
    return verdict(math.isclose(spam(q, one), spam(q, other)))


@solves("logistic-step")
def _(q: Question) -> Any:
    w0, w1, b, x0, x1, y, rate = numbers(q["question"].partition("weights")[2])[:7]
    assert y == 1
    point, x = np.array([w0, w1, b]), np.array([x0, x1, 1])

    def loss(at: np.ndarray) -> float:
        return math.log1p(math.exp(-at @ x))

    gradient = [(loss(point + e) - loss(point - e)) / 2e-6 for e in np.eye(3) * 1e-6]
    return round(math.exp(-loss(point - rate * np.array(gradient))), 6)


@solves("attention-parameters")
def _(q: Question) -> Any:
    model, heads, width = (int(n) for n in numbers(q["question"])[:3])
    rng = np.random.default_rng(0)
    inward = [rng.random((model, width)) for _ in range(3 * heads)]
    return matching(q, lambda option: int(option) == sum(m.size for m in inward) + heads * width * model)


@solves("beam-search")
def _(q: Question) -> Any:
    p = numbers(q["question"].partition("First token")[2])
    tree = {"A": (p[0], dict(zip("CDE", p[2:5], strict=True))), "B": (p[1], dict(zip("CD", p[5:7], strict=True)))}

    def search(width: int) -> tuple[str, float]:
        kept = sorted(tree, key=lambda first: -tree[first][0])[:width]
        pairs = {f"{a} {b}": tree[a][0] * chance for a in kept for b, chance in tree[a][1].items()}
        return max(pairs.items(), key=lambda pair: pair[1])

    (greedy, _), (beam, _), (best, chance) = search(1), search(2), search(9)
    truths = {
        "Greedy decoding returns the most probable sequence.": greedy == best,
        "Greedy decoding returns A C.": greedy == "A C",
        "Beam search with width 2 returns B C.": beam == "B C",
        "The most probable sequence has probability 0.36.": math.isclose(chance, 0.36),
    }
    return matching(q, truths.__getitem__)


@solves("attention-order")
def _(q: Question) -> Any:
    rng = np.random.default_rng(0)
    x, wq, wk, wv = rng.normal(size=(5, 4)), *rng.normal(size=(3, 4, 4))

    def layer(x: np.ndarray) -> np.ndarray:
        weights = np.exp((x @ wq) @ (x @ wk).T)
        return weights / weights.sum(1, keepdims=True) @ (x @ wv)

    order = [3, 0, 4, 1, 2]
    return verdict(np.allclose(layer(x[order]), layer(x)[order]))


# --- tagging and evaluation -------------------------------------------------------------------------------------------


@solves("bio-tags")
def _(q: Question) -> Any:
    def violates(option: str) -> bool:
        tags = ["O", *option.split()]
        return any(tag[0] == "I" and before[1:] != tag[1:] for before, tag in itertools.pairwise(tags))

    return matching(q, violates)


@solves("kappa-1")
def _(q: Question) -> Any:
    ss, so, os, oo = (int(n) for n in re.findall(r": (\d+)$", q["context"], re.M))
    assert f"the same {ss + so + os + oo} sentences" in q["context"]
    first = "S" * (ss + so) + "O" * (os + oo)
    second = "S" * ss + "O" * so + "S" * os + "O" * oo
    return cohen_kappa_score(list(first), list(second))


@solves("bleu")
def _(q: Question) -> Any:
    candidate, reference = (
        re.findall(rf"^{name}: (.+)$", q["question"], re.M)[0].split() for name in ("Candidate", "Reference")
    )
    logs = 0.0
    for n in (1, 2):
        grams, model = ([tuple(s[i : i + n]) for i in range(len(s) - n + 1)] for s in (candidate, reference))
        logs += math.log(sum(min(grams.count(g), model.count(g)) for g in set(grams)) / len(grams)) / 2
    return math.exp(logs + min(0, 1 - len(reference) / len(candidate)))


@solves("edit-distance")
def _(q: Question) -> Any:
    a, b = re.findall(r"'(\w+)'", q["question"])
    gap, change = (int(cost) for cost in re.findall(r"cost (\d)", q["question"]))

    @cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return gap * (i + j)
        swap = distance(i - 1, j - 1) + (0 if a[i - 1] == b[j - 1] else change)
        return min(swap, distance(i - 1, j) + gap, distance(i, j - 1) + gap)

    return distance(len(a), len(b))


@solves("zipf")
def _(q: Question) -> Any:
    first, top, rank = numbers(q["question"])
    assert first == 1
    return matching(q, lambda option: int(option) == top / rank)
