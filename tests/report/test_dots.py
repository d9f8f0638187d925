"""Dots with intervals: each in its row, where its value is."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pomona.report.dots import Dots, dots
from pomona.report.frame import COLOURS


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _columns(stem: Path, colour: str) -> list[tuple[int, int]]:
    """First and last column of the runs of rows with pixels of this colour, from the top, below the legend."""
    with Image.open(stem.with_suffix(".png")) as image:
        pixels = np.asarray(image.convert("RGB"))
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    at = (pixels == wanted).all(axis=2)[80:]
    rows = np.flatnonzero(at.any(axis=1))
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 3) + 1) if len(rows) else []
    spans = [np.flatnonzero(at[run].any(axis=0)) for run in runs]
    return [(int(span[0]), int(span[-1])) for span in spans]


def _texts(stem: Path) -> list[str]:
    return re.findall(r"<!-- (.*?) -->", stem.with_suffix(".svg").read_text(encoding="utf-8"))


def test_a_dot_stands_where_its_value_is_and_its_interval_reaches_from_low_to_high(tmp_path: Path) -> None:
    values = [10.0, 20.0, 40.0]
    dots(tmp_path / "d", "t", list("abc"), [Dots("s", values)], x_label="points", first_look=1)
    middles = [(first + last) / 2 for first, last in _columns(tmp_path / "d", COLOURS[1])]
    assert len(middles) == 3
    assert (middles[2] - middles[1]) / (middles[1] - middles[0]) == pytest.approx(2, rel=0.02)
    spread = Dots("s", values, [-10.0, 10.0, 40.0], [10.0, 20.0, 50.0])
    dots(tmp_path / "e", "t", list("abc"), [spread], x_label="points", first_look=1)
    lengths = [last - first for first, last in _columns(tmp_path / "e", COLOURS[1])]
    assert lengths[0] / lengths[1] == pytest.approx(2, rel=0.1) and lengths[1] == pytest.approx(lengths[2], rel=0.05)


def test_rows_stand_from_the_top_with_their_names_and_what_is_beside_them(tmp_path: Path) -> None:
    dots(
        *(tmp_path / "d", "t", ["one", "two"], [Dots("s", [1, 2])]),
        x_label="points",
        beside=("accuracy", ["31%", "86%"]),
        note="a note",
    )
    found = _texts(tmp_path / "d")
    assert [text for text in found if text in ("one", "two")] == ["one", "two"]
    assert {"accuracy", "31%", "86%", "a note", "s", "points"} <= set(found)
    (low, _), (high, _) = _columns(tmp_path / "d", COLOURS[0])[-2:]
    assert low < high


def test_zero_is_shown_where_all_values_are_far_from_it(tmp_path: Path) -> None:
    dots(tmp_path / "d", "t", ["a"], [Dots("s", [90])], x_label="x")
    assert "0" in _texts(tmp_path / "d")


def test_a_row_without_a_value_has_no_dot(tmp_path: Path) -> None:
    series = Dots("s", [5, None, 7], [4, None, math.nan], [6, None, math.nan])
    dots(tmp_path / "d", "t", ["a", "between", "c"], [series], x_label="x", first_look=1)
    assert len(_columns(tmp_path / "d", COLOURS[1])) == 2 and "between" in _texts(tmp_path / "d")


def test_series_of_a_row_lie_one_under_the_other_and_differ(tmp_path: Path) -> None:
    dots(tmp_path / "d", "t", ["a"], [Dots("s", [5]), Dots("r", [5])], x_label="x", first_look=1)
    assert len(_columns(tmp_path / "d", COLOURS[1])) == len(_columns(tmp_path / "d", COLOURS[2])) == 1


@pytest.mark.parametrize(
    ("series", "beside"),
    [([Dots("s", [1])], None), ([Dots("s", [1, 2], [1], [2, 3])], None), ([Dots("s", [1, 2])], ("h", ["x"]))],
)
def test_values_that_are_too_few_are_refused(tmp_path: Path, series: list[Dots], beside: Any) -> None:
    with pytest.raises(ValueError, match="1 values of 2 rows"):
        dots(tmp_path / "d", "t", ["a", "b"], series, x_label="x", beside=beside)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("values", [[], [0.0], [None], [math.nan, math.inf], [1e300, -1e300], [1e-300, 0.0]])
def test_dots_of_any_numbers_are_drawn(tmp_path: Path, values: list[Any]) -> None:
    rows = ["$\\frac$ <b>漢字</b> \x1b[31m" * 5] * len(values)
    dots(tmp_path / "d", "$\\frac$", rows, [Dots("$\\frac$", values, values, values)], x_label="$\\frac$")
    dots(tmp_path / "d", "t", rows, [], x_label="x", beside=("$\\frac$", rows))
