"""What a judge's reply is read as."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.methods.alpagasus_filter.parsing import first_line, parse_reference, parse_robust


@pytest.mark.parametrize(("reply", "value"), [("4.5", 4.5), (" 4.5 ", 4.5), ("5.0", 5.0), ("4", 4.0), ("0", 0.0)])
def test_both_parsers_read_a_plain_number(reply: str, value: float) -> None:
    assert parse_reference(reply) == value
    assert parse_robust(reply) == value


@pytest.mark.parametrize(
    "reply",
    [
        *("score: 4.5", "Score: 4.5", "Score:4.5", "Accuracy: 4.5"),
        *("4.5/5", "4.5 out of 5", "**4.5**", "4,5", "4.5.", "\n4.5"),
    ],
)
def test_only_the_robust_parser_reads_a_dressed_number(reply: str) -> None:
    assert parse_reference(reply) == -1
    assert parse_robust(reply) == 4.5


@pytest.mark.parametrize(("reply", "value"), [("10", 10.0), ("inf", math.inf), ("-1", -1.0)])
def test_the_reference_accepts_what_is_off_the_scale_and_the_robust_parser_does_not(reply: str, value: float) -> None:
    assert parse_reference(reply) == value
    assert parse_robust(reply) is None


def test_the_reference_accepts_nan_and_the_robust_parser_does_not() -> None:
    assert math.isnan(parse_reference("nan"))
    assert parse_robust("nan") is None


@pytest.mark.parametrize("reply", ["I cannot rate", "", "\n\n", "   ", "```"])
def test_a_reply_without_a_number_is_unparsed(reply: str) -> None:
    assert parse_reference(reply) == -1
    assert parse_robust(reply) is None


@pytest.mark.parametrize(
    "reply",
    [
        "# Score: 4.5",
        "**Score:** 4.5/5",
        "**Accuracy score: 4.5 / 5**",
        "Rating = 4.5",
        "The accuracy of the response is 4.5",
        "I would give this response a score of 4.5 out of 5.",
        "Score:\n4.5\nbecause",
        "```\n4.5\n```",
        '{"score": 4.5}',
        "[[4.5]]",
        "+4.5",
        "4.50",
        "4.5 - the answer is right",
        "4.5: the answer is right, but short",
        "4.5 points",
        "Score: 4.5 (out of 5)",
        "4.5\n\nThe 3 facts in the answer are right.",
        "4.5\r\nFine.",
        "<think>2 or 3? no.</think>\n\n4.5",
        "AI Assistant: 4.5",
    ],
)
def test_usual_dress_of_a_rating_is_read(reply: str) -> None:
    assert parse_robust(reply) == 4.5


@pytest.mark.parametrize(
    "reply",
    [
        "4.5 5",
        "4 or 5",
        "3-4",
        "4.5/10",
        "9 out of 10",
        "There are 3 errors",
        "Errors: 3",
        "3 errors were found",
        "1. Accuracy: 4.5",
        "1. The response is right",
        "4.5.1",
        "1e0",
        "1,000",
        "5.01",
        "-4.5",
        "٤",
        "½",
        "The answer is right.\n4.5",
    ],
)
def test_what_would_be_a_guess_is_unparsed(reply: str) -> None:
    assert parse_robust(reply) is None


def test_a_maximum_is_checked_against_the_scale_in_force() -> None:
    assert parse_robust("9/10", low=1, high=10) == 9
    assert parse_robust("4.5/5", low=1, high=10) is None
    assert parse_robust("0", low=1, high=10) is None


def test_the_words_of_the_dimension_are_a_label() -> None:
    assert parse_robust("Clarity: 4") is None
    assert parse_robust("Clarity: 4", dimension="clarity of style") == 4


@pytest.mark.parametrize(
    ("reply", "whole", "when_cut"),
    [("4", 4, None), ("Score: 4.", 4, None), ("4.5", 4.5, 4.5), ("4/5", 4, 4), ("4\nThe", 4, 4), ("4 - good", 4, 4)],
)
def test_a_number_cut_at_the_token_limit_is_not_taken_for_whole(reply: str, whole: float, when_cut: float) -> None:
    assert parse_robust(reply) == whole
    assert parse_robust(reply, cut=True) == when_cut


def test_first_line_skips_blank_lines() -> None:
    assert first_line("\n \n  4.5 \nwhy") == "4.5"
    assert first_line("") == ""


_fragments = st.sampled_from(
    ["4.5", "4", ",", ".", "/5", " out of ", "5", ":", "score", "\n", "**", "-", "nan", " ", "(", "<think>", "9" * 400]
)


@given(st.one_of(st.text(), st.lists(_fragments, max_size=12).map("".join)), st.booleans())
def test_robust_never_raises_and_stays_on_the_scale(reply: str, cut: bool) -> None:
    rating = parse_robust(reply, cut=cut)
    assert rating is None or 0 <= rating <= 5


@given(st.text())
def test_reference_never_raises(reply: str) -> None:
    assert isinstance(parse_reference(reply), float)
