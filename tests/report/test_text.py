"""Text of strangers, made fit to show."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from pomona.report.text import columns, fit, lines, one_line, wrap

ALPHABET = "ab -é漢字한国ｗ✓†–e\u0301"


@given(st.text(ALPHABET, max_size=60))
def test_columns_are_those_a_terminal_library_counts(text: str) -> None:
    assert columns(text) == cell_len(text)


@settings(max_examples=80)
@given(st.text(max_size=200), st.integers(2, 40))
def test_fitted_text_stays_within_its_columns_and_is_harmless(text: str, room: int) -> None:
    fitted = fit(text, room)
    assert columns(fitted) <= room and fitted.isprintable()


@settings(max_examples=80)
@given(st.text(ALPHABET + "\n\x1b\u202e", max_size=300), st.integers(20, 60))
def test_wrapped_lines_stay_within_the_width_and_lose_no_word(text: str, width: int) -> None:
    wrapped = wrap(text, width, "  ")
    assert all(cell_len(line) <= width for line in wrapped)
    words = one_line(text, 20 * width).split()
    assert all(word in " ".join(wrapped).split() for word in words if cell_len(word) <= width - 2)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one\r\ntwo\u2028three", "one\ntwo\nthree"),
        ("a\tb", "a   b"),
        ("\x1b[31mred\x07", "\ufffd[31mred\ufffd"),
        ("abc\u202edef", "abc\ufffddef"),
        ("no\u00a0break", "no break"),
        ("\ud800", "\ufffd"),
        ("漢字 é ✓", "漢字 é ✓"),
    ],
)
def test_lines_keep_their_breaks_and_lose_what_steers(text: str, shown: str) -> None:
    assert lines(text) == shown
