"""Language models, grammars, automata, parsers and the hidden Markov model."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from solvers import QUESTIONS, Question, matching, numbers, solves, verdict

# --- language models --------------------------------------------------------------------------------------------------


def bigrams(text: str) -> Counter[tuple[str, str]]:
    lines = [line.split() for line in text.splitlines() if line.startswith("<s>")]
    return Counter(pair for line in lines for pair in itertools.pairwise(line))


def sentence(q: Question, words: str, added: int = 0) -> Fraction:
    counts = bigrams(q["context"])
    types = len({w for _, w in counts})
    assert f"{types} in all" in q["context"]
    total = Fraction(1)
    for h, w in itertools.pairwise(["<s>", *words.split(), "</s>"]):
        history = sum(count for (first, _), count in counts.items() if first == h)
        total *= Fraction(counts[h, w] + added, history + added * types)
    return total


def quoted(text: str) -> str:
    return re.findall(r"'([^']+)'", text)[0]


@solves("lm-bigram-1")
def _(q: Question) -> Any:
    return sentence(q, quoted(q["question"]))


@solves("lm-bigram-2")
def _(q: Question) -> Any:
    words = quoted(q["question"])
    return math.exp(-math.log(sentence(q, words)) / (len(words.split()) + 1))


@solves("lm-bigram-3")
def _(q: Question) -> Any:
    return sentence(q, quoted(q["question"]), added=1)


@solves("lm-bigram-4")
def _(q: Question) -> Any:
    return matching(q, lambda option: sentence(q, option) == 0)


@solves("lm-kneser-ney")
def _(q: Question) -> Any:
    counts = {(h, w): int(n) for h, w, n in re.findall(r"(\w+) (\w+) (\d+)", q["question"].partition(":")[2])}
    d = Fraction(re.findall(r"d = ([\d.]+);", q["question"])[0])

    def probability(h: str, w: str) -> Fraction:
        after = [count for (first, _), count in counts.items() if first == h]
        spread = Fraction(sum(second == w for _, second in counts), len(counts))
        return (max(counts.get((h, w), 0) - d, Fraction(0)) + d * len(after) * spread) / sum(after)

    assert sum(probability("hot", w) for w in {w for _, w in counts}) == 1
    return probability("hot", "tea")


@solves("lm-cross-entropy")
def _(q: Question) -> Any:
    a, b = numbers(q["question"])
    assert 2**b / 2**a == 0.5
    return matching(q, lambda option: "half" in option)


@solves("lm-interpolation")
def _(q: Question) -> Any:
    text = np.random.default_rng(0).choice(list("abc"), 60).tolist()
    grams = [Counter(zip(*(text[i:] for i in range(n)), strict=False)) for n in (1, 2, 3)]

    def likelihood(weights: tuple[float, ...]) -> float:
        total = 0.0
        for u, v, w in zip(text, text[1:], text[2:], strict=False):
            after_v = sum(count for (first, _), count in grams[1].items() if first == v)
            after_uv = sum(count for key, count in grams[2].items() if key[:2] == (u, v))
            estimates = grams[0][w,] / len(text), grams[1][v, w] / after_v, grams[2][u, v, w] / after_uv
            total += math.log(sum(a * b for a, b in zip(weights, estimates, strict=True)))
        return total

    grid = [(i / 10, j / 10, (10 - i - j) / 10) for i in range(11) for j in range(11 - i)]
    assert max(grid, key=likelihood) == (0, 0, 1)
    return matching(q, lambda option: option == "All weight on the trigram")


@solves("bpe-merges")
def _(q: Question) -> Any:
    words = {tuple(word): int(n) for word, n in re.findall(r"([a-z]+) (\d+)", q["question"])}
    merged = []
    for _step in range(2):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        (best, first), (_, second) = pairs.most_common(2)
        assert first > second, "no tie"
        merged.append("".join(best))
        glued = {re.sub(rf"(?<!\S){best[0]} {best[1]}(?!\S)", merged[-1], " ".join(w)): n for w, n in words.items()}
        words = {tuple(word.split()): n for word, n in glued.items()}
    return ", ".join(merged)


# --- grammars, automata, parsers --------------------------------------------------------------------------------------


def trees(context: str, symbol: str, words: tuple[str, ...]) -> Iterator[tuple[Fraction, str, int]]:
    """Every parse: its probability, its bracketing and its number of rule applications."""
    for left, right, p in re.findall(r"^(\w+) -> (.+) \[(.+)\]$", context, re.M):
        if left != symbol:
            continue
        match right.split():
            case [word]:
                if words == (word,):
                    yield Fraction(p), f"({symbol} {word})", 1
            case [first, second]:
                for cut in range(1, len(words)):
                    for a, b in itertools.product(
                        trees(context, first, words[:cut]), trees(context, second, words[cut:])
                    ):
                        yield Fraction(p) * a[0] * b[0], f"({symbol} {a[1]} {b[1]})", 1 + a[2] + b[2]


def film(q: Question) -> list[tuple[Fraction, str, int]]:
    rules = re.findall(r"^(\w+) -> .+ \[(.+)\]$", q["context"], re.M)
    assert all(sum(Fraction(p) for left, p in rules if left == symbol) == 1 for symbol, _ in rules)
    words = q["context"].rpartition(": ")[2]
    return list(trees(q["context"], "S", tuple(words.split())))


@solves("pcfg-1")
def _(q: Question) -> Any:
    (found,) = [p for p, tree, _ in film(q) if "(VP (VP" in tree]
    return found


@solves("pcfg-2")
def _(q: Question) -> Any:
    return sum(p for p, _, _ in film(q))


@solves("pcfg-3")
def _(q: Question) -> Any:
    nouns = re.findall(r"^NP -> (\w+) \[", q["context"], re.M)
    found = False
    for x, y, z in itertools.product(nouns, repeat=3):
        parses = list(trees(q["context"], "S", (x, "films", y, "with", z)))
        assert len(parses) == 2
        (verb,) = [p for p, tree, _ in parses if "(VP (VP" in tree]
        found |= sum(p for p, _, _ in parses) - verb > verb
    return "Yes" if found else "No"


@solves("pcfg-4")
def _(q: Question) -> Any:
    return len(list(trees(q["context"], "S", tuple(quoted(q["question"]).split()))))


@solves("cnf-steps")
def _(q: Question) -> Any:
    grammar = QUESTIONS["pcfg-1"]["context"]
    for words in (("Mia",), *(("Mia", "films", "birds") + ("with", "drones") * n for n in range(4))):
        for symbol in ("S", "NP"):
            assert all(steps == 2 * len(words) - 1 for _, _, steps in trees(grammar, symbol, words))
    return "2n - 1"


@solves("cfg-strings")
def _(q: Question) -> Any:
    language, form = set(), "S"
    for _step in range(9):
        language.add(form.replace("S", "c"))
        form = form.replace("S", "aSb")
    return matching(q, lambda option: option in language)


@solves("fsa-subset")
def _(q: Question) -> Any:
    def residuals(n: int) -> int:
        """How many states any automaton needs to know if the symbol n - 1 from the end is a (Myhill-Nerode)."""
        ends = [tail for size in range(n - 1) for tail in itertools.product("ab", repeat=size)]
        heads = itertools.product("ab", repeat=n - 1)
        return len({tuple((head + tail)[-(n - 1)] == "a" for tail in ends) for head in heads})

    return verdict(all(residuals(n) >= 2 ** (n - 1) for n in range(2, 10)))


@solves("dep-projective")
def _(q: Question) -> Any:
    def projective(option: str) -> bool:
        arcs = [sorted((head, place)) for place, head in enumerate(map(int, numbers(option)), 1)]
        return not any(a < c < b < d for (a, b), (c, d) in itertools.permutations(arcs, 2))

    return matching(q, projective)


@cache
def derivations() -> list[list[tuple[str, frozenset[str]]]]:
    """Every derivation of the gold tree: transitions, each with the arcs there are after it."""
    context = QUESTIONS["arc-standard-1"]["context"]
    words = re.findall(r"sentence is: (.+)", context)[0].split()
    gold = set(re.findall(r"\w+ -> \w+", context.partition("arcs (head -> dependent) are:")[2]))
    found = []

    def go(stack: list[str], buffer: list[str], arcs: frozenset[str], done: list[Any]) -> None:
        if not buffer and stack == ["ROOT"]:
            if arcs == gold:
                found.append(done)
            return
        if buffer:
            go([*stack, buffer[0]], buffer[1:], arcs, [*done, ("SHIFT", arcs)])
        if len(stack) > 1:
            *rest, below, top = stack
            left, right = arcs | {f"{top} -> {below}"}, arcs | {f"{below} -> {top}"}
            if below != "ROOT":
                go([*rest, top], buffer, left, [*done, ("LEFT-ARC", left)])
            go([*rest, below], buffer, right, [*done, ("RIGHT-ARC", right)])

    go(["ROOT"], words, frozenset(), [])
    return found


def begun(q: Question) -> list[list[tuple[str, frozenset[str]]]]:
    start = re.findall(r"SHIFT|LEFT-ARC|RIGHT-ARC", q["question"])
    return [done for done in derivations() if [name for name, _ in done[: len(start)]] == start]


@solves("arc-standard-1")
def _(q: Question) -> Any:
    (length,) = {len(done) for done in derivations()}
    return str(length)


@solves("arc-standard-2")
def _(q: Question) -> Any:
    following = {done[4][0] for done in begun(q)}
    return matching(q, lambda option: option in following)


@solves("arc-standard-3")
def _(q: Question) -> Any:
    (arcs,) = {[arcs for name, arcs in done if name == "SHIFT"][-1] for done in begun(q)}
    return matching(q, lambda option: option in arcs)


# --- the hidden Markov model ------------------------------------------------------------------------------------------


TOTALS = (("", 1), ("N", 2), ("V", 2))  # initial; transitions and emissions


@cache
def paths(context: str) -> dict[str, float]:
    given = {(a, b): float(p) for a, b, p in re.findall(r"P\((\w+)(?: \| (\w))?\) = ([\d.]+)", context)}
    assert all(math.isclose(sum(p for (_, a), p in given.items() if a == state), total) for state, total in TOTALS)
    words = context.rpartition(": ")[2].split()
    joint = {}
    for states in itertools.product("NV", repeat=len(words)):
        p = given[states[0], ""]
        p *= math.prod(given[b, a] for a, b in itertools.pairwise(states))
        joint[" ".join(states)] = p * math.prod(given[w, s] for s, w in zip(states, words, strict=True))
    return joint


@solves("hmm-1")
def _(q: Question) -> Any:
    return sum(paths(q["context"]).values())


@solves("hmm-2")
def _(q: Question) -> Any:
    return max(paths(q["context"]), key=paths(q["context"]).__getitem__)


@solves("hmm-3")
def _(q: Question) -> Any:
    joint = paths(q["context"])
    return max(joint.values()) / sum(joint.values())
