"""What a multiple-choice reply is read as, and what several replies vote for."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.methods.nlpbench_eval.choices import Vote, parse_lenient, parse_strict, vote_sets, vote_texts

COMPANIES = ["Google", "Meta", "DeepMind", "OpenAI"]
METHODS = ["Viterbi", "the forward algorithm", "the forward algorithm with pruning", "CKY parsing", "None of these"]
TRUTH = ["True", "False"]
YES = ["Yes", "No"]
YEARS = ["2017", "2018", "2019"]


@pytest.mark.parametrize(
    ("reply", "picks"),
    [
        ("3", {3}),
        (" 2 , 0 ", {0, 2}),
        ("'0','2'", {0, 2}),
        ("0, 2\n", {0, 2}),
        ("0,0,2", {0, 2}),
        ('"1"', {1}),
        ("7", {7}),
        ("0,2.", None),
        ("Answer: 3", None),
        ("3: OpenAI", None),
        ("", None),
        (None, None),
        ("0,", None),
        ("0 2", None),
        ("-1", None),
        ("1.0", None),
        ("²", None),
        ("٣", None),
        ("9" * 5000, None),
    ],
)
def test_strict_reads_only_a_reply_of_indices(reply: str | None, picks: set[int] | None) -> None:
    assert parse_strict(reply) == picks


CHATTY = [
    ("Answer: 3", {3}),
    ("3: OpenAI", {3}),
    ("0,2.", {0, 2}),
    ("b", {1}),
    ("0 is wrong, so 2", {2}),
    ("B", {1}),
    ("(b)", {1}),
    ("B.", {1}),
    ("b) Meta", {1}),
    ("**B**", {1}),
    ("**2**", {2}),
    ("[2]", {2}),
    ("{0, 2}", {0, 2}),
    ("(0, 2)", {0, 2}),
    ("0 and 2", {0, 2}),
    ("0, 1 and 3", {0, 1, 3}),
    ("0, 1, and 3", {0, 1, 3}),
    ("0 & 2", {0, 2}),
    ("0; 2", {0, 2}),
    ("0\n2", {0, 2}),
    ("- 0\n- 2", {0, 2}),
    ("Both A and C", {0, 2}),
    ("A, C", {0, 2}),
    ("A and C are correct.", {0, 2}),
    ("Options 0 and 2 are correct.", {0, 2}),
    ("Option 2", {2}),
    ("Option 2 is correct.", {2}),
    ("Option B is the correct answer.", {1}),
    ("Only 2 is true.", {2}),
    ("The correct option is 2", {2}),
    ("The correct option is (2).", {2}),
    ("The correct options are 0 and 2.", {0, 2}),
    ("The correct answers are: 0, 2", {0, 2}),
    ("The answer is option C.", {2}),
    ("The answer is **C**.", {2}),
    ("The answer is 2: DeepMind.", {2}),
    ("The answer is DeepMind.", {2}),
    ("The answer is DeepMind (2).", {2}),
    ("The answer is the company DeepMind, a London lab.", {2}),
    ("The correct answer to the question is 2.", {2}),
    ("The option that best describes the lab is 2.", {2}),
    ("Final answer: 2", {2}),
    ("**Final Answer:** 2", {2}),
    ("### Answer\n\nAnswer:\n\n2", {2}),
    ("Answer(s): 0, 2", {0, 2}),
    ("Answer - 2", {2}),
    ("answer = 2", {2}),
    ("Answer → 2", {2}),
    ("=> 2", {2}),
    ("I would choose 2.", {2}),
    ("I'd go with B.", {1}),
    ("I think it is 2.", {2}),
    ("It's 2.", {2}),
    ("Therefore, 2.", {2}),
    ("Hence the answer must be 2", {2}),
    ("Let us think. The lab is in London, so 2", {2}),
    (r"$\boxed{2}$", {2}),
    (r"\boxed{\text{C}}", {2}),
    (r"The lab is \boxed{2}, not \(3\).", {2}),
    (r"First \boxed{1}; checking again: \boxed{2}", {2}),
    (r"$\text{Answer: } 2$", {2}),
    ("```\n2\n```", {2}),
    ('```json\n{"answer": 2}\n```', {2}),
    ('{"answer": [0, 2]}', {0, 2}),
    ("['0', '2']", {0, 2}),
    ("`2`", {2}),
    ("“2”", {2}),
    ("２", {2}),
    ("2\u200b", {2}),
    ("2 (DeepMind)", {2}),
    ("2 - DeepMind", {2}),
    ("2. DeepMind", {2}),
    ("0: Google\n2: DeepMind", {0, 2}),
    ("0 (Google) and 2 (DeepMind)", {0, 2}),
    ("0: Google, 2: DeepMind", {0, 2}),
    ("DeepMind", {2}),
    ("deepmind.", {2}),
    ("Google and DeepMind", {0, 2}),
    ("DeepMind, because AlphaGo came from there", {2}),
    ("It was made in London. That lab is DeepMind.", {2}),
    ("not 1 but 3", {3}),
    ("The answer is not 1, but 3.", {3}),
    ("The answer is 2, not 3.", {2}),
    ("2, because GPT-3 is by another lab.", {2}),
    ("GPT-3 has 175 billion parameters, but the answer is 1", {1}),
    ("In 2017 the Transformer appeared; the answer is 0.", {0}),
    ("The 4 labs differ in 3 ways. Answer: 1", {1}),
    ("2\n\nExplanation: AlphaGo won 4 of 5 games in 2016.", {2}),
    ("Option 1 looks tempting: it is large. But on reflection the answer is 2.", {2}),
    ("The answer is 1? Wait. No: the answer is 3.", {3}),
    ("0: Google\n1: Meta\n2: DeepMind\n3: OpenAI\n\nAnswer: 2", {2}),
    ("<think>Maybe 1? The answer is 1.</think>\n\n2", {2}),
    ("Maybe 1, the answer is 1 ...</think>2", {2}),
    ("0 is false, 1 is true, 2 is false, 3 is true", {1, 3}),
    ("0: incorrect\n1: correct\n2: incorrect\n3: correct", {1, 3}),
    ("Step 1: read. Step 2: think.\n\n3", {3}),
    ("Q: which lab?\nA: 2", {2}),
    ("Sure! The correct choice is B) Meta. Let me know if you have other questions.", {1}),
    ("The answers are 1 and 3, while 0 and 2 are false.", {1, 3}),
]


@pytest.mark.parametrize(("reply", "picks"), CHATTY, ids=[reply for reply, _ in CHATTY])
def test_lenient_reads_what_a_careful_person_would(reply: str, picks: set[int]) -> None:
    assert parse_lenient(reply, COMPANIES) == picks


@pytest.mark.parametrize(
    "reply",
    [
        *("", "   ", "I do not know.", "None of the above", "1 or 2", "A or B", "either 1 or 2", "7", "Answer: 7"),
        *("The answer is 1 or 2.", "The answer is either 1 or 2.", "0, 7", "F", "-1", "2.5", "2/3", "2-gram", "50%"),
        *("2 layers", "3rd", "1) First we read.\n2) Then we think.", "**0** and perhaps **1**", "The answer is not 2."),
        *("The answer is 2. No, the answer is not 2.", "2: OpenAI", "C) Meta", "Google is not DeepMind"),
        *(
            "0: Google\n1: Meta\n2: DeepMind\n3: OpenAI",
            "Google bought DeepMind",
            "It is not OpenAI",
            "This cannot be OpenAI",
            "Nobody would say OpenAI is wrong here",
        ),
        *("Maybe option 1 is correct. Or maybe option 2 is correct.", "<think>The answer is 2", "A language model"),
        *(
            "As an AI model, I can't say.",
            "There are 3 reasons",
            "So 2 of the labs are American.",
            "So 2 layers suffice",
        ),
        *("GPT-3", "The answer is unclear.", "C++", "I"),
    ],
)
def test_lenient_does_not_guess(reply: str) -> None:
    assert parse_lenient(reply, COMPANIES) is None


@pytest.mark.parametrize(
    ("reply", "options", "picks"),
    [
        ("None of these", METHODS, {4}),
        ("None of these is correct, so the answer is 4", METHODS, {4}),
        ("The answer is none of these.", METHODS, {4}),
        ("Use the forward algorithm with pruning.", METHODS, {2}),
        ("We should use the forward algorithm.", METHODS, {1}),
        ("the forward algorithm", METHODS, {1}),
        ("Viterbi finds the best path, so the answer is Viterbi decoding.", METHODS, {0}),
        ("The statement is true.", TRUTH, {0}),
        ("False", TRUTH, {1}),
        ("False. Attention is quadratic.", TRUTH, {1}),
        ("It is not true.", TRUTH, None),
        ("No, because the grammar is ambiguous.", YES, {1}),
        ("Yes.", YES, {0}),
        ("2018", YEARS, {1}),
        ("The answer is 2018.", YEARS, {1}),
        ("BERT came out in 2018", YEARS, {1}),
        ("0", YEARS, {0}),
        ("3", ["1", "2", "3", "4"], {3}),
        ("Answer: 3", ["1", "2", "3", "4"], {3}),
        ("A and B", ["Adam", "SGD", "A and B", "neither"], {2}),
        ("A", ["B", "A"], {1}),
        ("foo", ["(a) foo", "(b) bar"], {0}),
        ("same", ["same", "same"], None),
        ("O(n^2)", ["O(n)", "O(n^2)", "O(n^3)"], {1}),
        ("It takes O(n^2).", ["O(n)", "O(n^2)", "O(n^3)"], {1}),
        ("$O(n^2)$", ["$O(n)$", "$O(n^2)$"], {1}),
        ("It's not convex", ["It's convex", "It's not convex"], {1}),
        ("E", METHODS, {4}),
        ("c++", ["Java", "C++", "C"], {1}),
        ("2", [], None),
    ],
)
def test_the_options_decide_what_words_mean(reply: str, options: list[str], picks: set[int] | None) -> None:
    assert parse_lenient(reply, options) == picks


def test_null_content_picks_nothing() -> None:
    assert parse_lenient(None, COMPANIES) is None


_separators = st.sampled_from([",", ", ", " , ", ",\n"])
_quotes = st.sampled_from(["{}", "'{}'", '"{}"', " {} "])


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), _separators, _quotes, st.lists(st.text(), max_size=6))
def test_lenient_agrees_with_strict_in_range(
    numbers: list[int], separator: str, quote: str, options: list[str]
) -> None:
    reply = separator.join(quote.format(number) for number in numbers)
    assert parse_strict(reply) == set(numbers)
    if max(numbers) < len(options):
        assert parse_lenient(reply, options) == set(numbers)


_words = ["answer", " is ", "so ", "not ", "2", "a", "B", ",", " and ", " or ", "(", ")", "**", "\\boxed{", "}", "\n"]
_pieces = st.lists(st.sampled_from([*_words, ":", ".", "correct", " ", "<think>", "</think>", "OpenAI", "- "]))


@settings(deadline=None)
@given(st.one_of(st.text(), _pieces.map("".join)), st.lists(st.text(), max_size=6))
def test_lenient_never_raises_and_stays_in_range(reply: str, options: list[str]) -> None:
    picks = parse_lenient(reply, options)
    assert picks is None or (picks and all(0 <= pick < len(options) for pick in picks))


@pytest.mark.parametrize(
    "unit",
    [
        "(",
        "2,",
        "2 ",
        "answer is ",
        "so so ",
        "\\boxed{",
        "**",
        "- ",
        "a, b and ",
        "the ",
        "not ",
        "OpenAI",
        "\n",
        "2. ",
    ],
)
def test_a_hostile_reply_is_read_in_bounded_time(unit: str) -> None:
    start = time.process_time()
    parse_strict(unit * 200_000)
    parse_lenient(unit * 200_000, COMPANIES)
    parse_lenient((unit * 6000)[:5999], COMPANIES)
    assert time.process_time() - start < 10  # tens of times what it takes; backtracking without bound takes minutes


def test_only_the_last_lines_of_a_very_long_reply_are_read() -> None:
    assert parse_lenient("The answer is 1.\n" + "x " * 1000 + "\n" + "y " * 3500 + "\n" + "2", COMPANIES) == {2}
    assert parse_lenient("x" * 7000 + "2", COMPANIES) is None


def test_the_vote_of_check_4() -> None:
    replies = ["1", "2,0", "0,2"]
    released = vote_texts(replies)
    assert released == Vote("1", 1 / 3, True)
    assert parse_strict(released.choice) == {1}
    assert vote_sets([parse_strict(reply) for reply in replies]) == Vote(frozenset({0, 2}), 2 / 3, False)


def test_released_votes_ignore_spaces_and_quotes_only() -> None:
    assert vote_texts(["0, 2", "'0','2'", "2,0"]) == Vote("0,2", 2 / 3, False)
    assert vote_texts(["2\n", "2", "2"]) == Vote("2", 2 / 3, False)


def test_a_tie_goes_to_the_first_voted_for() -> None:
    one, two = frozenset({1}), frozenset({2})
    assert vote_sets([two, one, one, two]) == Vote(two, 0.5, True)
    assert vote_sets([None, two, one]) == Vote(two, 1 / 3, True)


def test_the_unread_abstain_but_count_in_the_share() -> None:
    assert vote_sets([None, None, frozenset({1})]) == Vote(frozenset({1}), 1 / 3, False)
    assert vote_sets([None, None]) == Vote(None, 0.0, False)
    assert vote_sets([]) == Vote(None, 0.0, False)
