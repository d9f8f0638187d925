"""Synthetic sequences that ask for what stood earlier, drawn many at a time.

Every sequence of P pairs has 4P tokens, numbers below the size V of the vocabulary. Where an answer is due, `answers`
has it, in the place of the token that asks for it; everywhere else it has `IGNORED`. All sequences of a task have the
same number of answers, and each answer follows from the tokens up to the one that asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IGNORED = -100

Integers = NDArray[np.int64]


class Sequences(NamedTuple):
    """Sequences and what they ask for.

    Attributes:
        tokens: (n, 4P).
        answers: (n, 4P), a token or `IGNORED`.
    """

    tokens: Integers
    answers: Integers


def mqar(random: np.random.Generator, count: int, pairs: int, vocabulary: int) -> Sequences:
    """Multi-query associative recall (arXiv 2312.04927): k1 v1 ... kP vP, then each key once among filler.

    Keys are P distinct tokens of the lower half of the vocabulary, values P distinct ones of the upper half. A key's
    second place is any of the later 2P; its answer is the value. Filler is any token but the P keys: one that repeated
    a live key would ask what is not scored, and what followed it could pass for its value (zoology #29).
    """
    half = vocabulary // 2
    lower = _shuffled(random, count, half)
    keys, values = lower[:, :pairs], half + _shuffled(random, count, half)[:, :pairs]
    upper = np.broadcast_to(np.arange(half, vocabulary), (count, half))
    harmless = np.concatenate((lower[:, pairs:], upper), axis=1)
    filler = random.integers(vocabulary - pairs, size=(count, 2 * pairs))
    context = np.stack((keys, values), axis=2).reshape(count, 2 * pairs)
    tokens = np.concatenate((context, np.take_along_axis(harmless, filler, axis=1)), axis=1)
    answers = np.full_like(tokens, IGNORED)
    places = 2 * pairs + _shuffled(random, count, 2 * pairs)[:, :pairs]
    np.put_along_axis(tokens, places, keys, axis=1)
    np.put_along_axis(answers, places, values, axis=1)
    return Sequences(tokens, answers)


def induction(random: np.random.Generator, count: int, pairs: int, vocabulary: int) -> Sequences:
    """One token comes back at the very end; the answer is the token that followed it (arXiv 2209.11895).

    The token is drawn anew for each sequence and stands once before, anywhere but in the last place before the end; all
    else is drawn at random from the other tokens. Which token will come back shows only at the end, so that all that
    stood before must be remembered: of a token agreed on beforehand every kernel can keep the one successor.
    """
    length = 4 * pairs
    trigger = random.integers(vocabulary, size=(count, 1))
    tokens = (trigger + random.integers(1, vocabulary, size=(count, length))) % vocabulary
    place = random.integers(length - 2, size=(count, 1))
    np.put_along_axis(tokens, place, trigger, axis=1)
    tokens[:, -1:] = trigger
    answers = np.full_like(tokens, IGNORED)
    answers[:, -1:] = np.take_along_axis(tokens, place + 1, axis=1)
    return Sequences(tokens, answers)


def copy(random: np.random.Generator, count: int, pairs: int, vocabulary: int) -> Sequences:
    """D x1 ... xm D x1 ... xm with m = 2P - 1: the second D asks for x1, and each token after it for the next.

    The delimiter D is the last token of the vocabulary, x are distinct others: the model has no positions, so that a
    token that stood twice would leave open which successor is meant.
    """
    size = 2 * pairs - 1
    string = _shuffled(random, count, vocabulary - 1)[:, :size]
    delimiter = np.full((count, 1), vocabulary - 1)
    tokens = np.concatenate((delimiter, string, delimiter, string), axis=1)
    answers = np.full_like(tokens, IGNORED)
    answers[:, 2 * pairs : -1] = string
    return Sequences(tokens, answers)


def _shuffled(random: np.random.Generator, count: int, size: int) -> Integers:
    """(count, size): 0 ... size - 1 in an order of its own in each row."""
    return random.random((count, size)).argsort(axis=1)


Task = Callable[[np.random.Generator, int, int, int], Sequences]

TASKS: Mapping[str, Task] = {"mqar": mqar, "induction": induction, "copy": copy}
