"""That the sequences of recall ask what they say, and that their answers can be known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pomona.methods.attn_compare.recall.tasks import IGNORED, TASKS, Sequences

VOCABULARY = 64


def drawn(task: str, count: int = 400, pairs: int = 8, vocabulary: int = VOCABULARY, seed: int = 0) -> Sequences:
    return TASKS[task](np.random.default_rng(seed), count, pairs, vocabulary)


def remembered(tokens: list[int], place: int, pairs: int) -> int:
    """mqar: reads keys and values one after the other, and looks up the token that asks."""
    book = {}
    for index in range(0, 2 * pairs, 2):
        book[tokens[index]] = tokens[index + 1]
    return book[tokens[place]]


def successor(tokens: list[int], place: int, pairs: int) -> int:
    """induction: what followed the token that asks, where it stood before."""
    return tokens[tokens.index(tokens[place]) + 1]


def next_of_string(tokens: list[int], place: int, pairs: int) -> int:
    """copy: counts how far the second reading is and reads as far in the first."""
    delimiter = tokens[0]
    second = tokens.index(delimiter, 1)
    return tokens[1 + place - second]


ORACLES: dict[str, Callable[[list[int], int, int], int]] = {
    "mqar": remembered,
    "induction": successor,
    "copy": next_of_string,
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("pairs", "vocabulary"), [(1, 4), (2, 4), (8, 64), (32, 64), (5, 128)])
def test_an_oracle_that_reads_up_to_the_question_answers_everything(task: str, pairs: int, vocabulary: int) -> None:
    tokens, answers = drawn(task, 200, pairs, vocabulary)
    assert tokens.shape == answers.shape == (200, 4 * pairs)
    assert tokens.min() >= 0 and tokens.max() < vocabulary
    for sequence, due in zip(tokens.tolist(), answers.tolist(), strict=True):
        places = [place for place, answer in enumerate(due) if answer != IGNORED]
        assert len(places) == {"mqar": pairs, "induction": 1, "copy": 2 * pairs - 1}[task]
        for place in places:
            assert ORACLES[task](sequence[: place + 1], place, pairs) == due[place]


@pytest.mark.parametrize("pairs", [1, 4, 16, 32])
def test_filler_never_repeats_a_live_key(pairs: int) -> None:
    tokens, answers = drawn("mqar", 3000, pairs)
    for sequence, due in zip(tokens.tolist(), answers.tolist(), strict=True):
        live, later = sequence[0 : 2 * pairs : 2], range(2 * pairs, 4 * pairs)
        asked = [sequence[place] for place in later if due[place] != IGNORED]
        filler = {sequence[place] for place in later if due[place] == IGNORED}
        assert sorted(asked) == sorted(live) and len(set(live)) == pairs
        assert not filler & set(live)
        assert all(answer == IGNORED for answer in due[: 2 * pairs])


def test_keys_are_of_the_lower_half_and_values_of_the_upper_each_once() -> None:
    tokens, _ = drawn("mqar", 2000, 16)
    keys, values = tokens[:, 0:32:2], tokens[:, 1:32:2]
    assert set(np.unique(keys)) == set(range(32)) and set(np.unique(values)) == set(range(32, 64))
    assert all(len(set(row)) == 16 for row in values.tolist())


def test_every_place_and_token_is_as_likely_as_it_should_be() -> None:
    """Counts against their expectation, within five standard errors."""
    tokens, answers = drawn("mqar", 20_000, 4, 16)
    asked = (answers[:, 8:] != IGNORED).sum(0)
    assert np.abs(asked - 10_000).max() < 5 * np.sqrt(20_000 / 4)
    first = np.bincount(tokens[:, 0], minlength=16)[:8]
    assert np.abs(first - 2500).max() < 5 * np.sqrt(20_000 / 8)
    filler = tokens[:, 8:][answers[:, 8:] == IGNORED]
    share = np.bincount(filler, minlength=16) / len(filler)
    assert share[:8] == pytest.approx(0.5 / 12, abs=0.003)  # half of the keys are live
    assert share[8:] == pytest.approx(1 / 12, abs=0.005)
    places = drawn("induction", 20_000, 2, 16).tokens
    earlier = (places[:, :-1] == places[:, -1:]).sum(0)
    assert earlier[-1] == 0 and np.abs(earlier[:-1] - 20_000 / 6).max() < 5 * np.sqrt(20_000 / 6)


def test_the_token_that_comes_back_stood_once_before() -> None:
    tokens, answers = drawn("induction", 2000, 8)
    assert ((tokens[:, :-1] == tokens[:, -1:]).sum(1) == 1).all()
    assert (answers[:, :-1] == IGNORED).all()
    assert len(np.unique(tokens[:, -1])) == VOCABULARY


def test_a_copied_string_repeats_no_token_and_never_the_delimiter() -> None:
    tokens, _ = drawn("copy", 500, 32)
    assert (tokens[:, [0, 64]] == 63).all()
    assert (tokens[:, 1:64] == tokens[:, 65:]).all()
    assert all(sorted(row) == list(range(63)) for row in tokens[:, 1:64].tolist())


@pytest.mark.parametrize("task", TASKS)
def test_sequences_depend_on_the_stream_alone(task: str) -> None:
    first, again, other = drawn(task), drawn(task), drawn(task, seed=1)
    assert (first.tokens == again.tokens).all() and (first.answers == again.answers).all()
    assert (first.tokens != other.tokens).any()
