"""Stacked areas: as large as their shares, named where they end, and drawn from any numbers."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.isotonic import IsotonicRegression

from pomona.report.areas import apart, areas, leading
from pomona.report.charts import Series

LABELS = {"x_label": "epoch", "y_label": "chosen"}
BLUE, GREEN, REST = "#0072B2", "#009E73", "#B4B9BF"


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _texts(stem: Path) -> list[str]:
    source = stem.with_suffix(".svg").read_text(encoding="utf-8")
    return [unescape(text) for text in re.findall(r"<!-- (.*?) -->", source)]


def _where(stem: Path, colour: str) -> Any:
    """Rows and columns of the pixels of exactly this colour, (pixels, 2)."""
    with Image.open(stem.with_suffix(".png")) as image:
        pixels = np.asarray(image.convert("RGB"))
    return np.argwhere((pixels == [int(colour[start : start + 2], 16) for start in (1, 3, 5)]).all(axis=2))


def test_an_area_is_as_large_as_its_share_and_the_largest_lies_lowest(tmp_path: Path) -> None:
    areas(tmp_path / "a", "t", [0, 1, 2], [("less", [0.25] * 3), ("more", [0.75] * 3)], **LABELS)
    more, less = _where(tmp_path / "a", BLUE), _where(tmp_path / "a", GREEN)
    assert len(more) / len(less) == pytest.approx(3, rel=0.03)
    assert more[:, 0].mean() > less[:, 0].mean()


def test_each_area_is_named_with_its_last_share_in_the_order_they_are_stacked(tmp_path: Path) -> None:
    layers = [("a", [0.2, 0.004]), ("b", [0.3, 0.596]), ("c", [0.5, 0.4])]
    areas(tmp_path / "a", "t", [3, 7], layers, **LABELS)
    named = [text for text in _texts(tmp_path / "a") if re.fullmatch(r"[abc]  .*%", text)]
    assert named == ["b  60%", "c  40%", "a  <1%"]
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    described = next(element.text for element in root.iter() if element.tag.endswith("}description"))
    assert described == "a  <1%; c  40%; b  60%"


def test_the_line_to_a_name_begins_in_the_middle_of_where_its_area_ends(tmp_path: Path) -> None:
    areas(tmp_path / "a", "t", [0, 1], [("a", [0.9, 0.4]), ("b", [0.1, 0.6])], **LABELS)
    rows, columns = _where(tmp_path / "a", BLUE).T
    last = max(column for column, count in enumerate(np.bincount(columns)) if count > 50)
    beyond = rows[(columns > last + 2) & (columns < last + 8)]
    assert beyond.mean() == pytest.approx(rows[columns == last].mean(), abs=3)


def test_places_are_drawn_in_their_order_whatever_that_of_the_numbers(tmp_path: Path) -> None:
    values = [0.1, 0.5, 0.9]
    areas(tmp_path / "a", "t", [0, 1, 2], [("a", values), ("b", [1 - v for v in values])], **LABELS)
    areas(tmp_path / "b", "t", [2, 0, 1], [("a", [0.9, 0.1, 0.5]), ("b", [0.1, 0.9, 0.5])], **LABELS)
    assert "a  90%" in _texts(tmp_path / "a")
    assert len(_where(tmp_path / "a", BLUE)) == pytest.approx(len(_where(tmp_path / "b", GREEN)), rel=0.05)


def test_of_more_than_nine_the_eight_with_the_largest_areas_are_named_and_the_rest_is_one(tmp_path: Path) -> None:
    shares = [[0.135 - 0.01 * place] * 2 for place in range(10)]
    shares[9] = [0.0, 0.102]  # large at the end, but not on the whole
    layers = list(zip("abcdefghij", shares, strict=True))
    assert leading(layers) == list("abcdefgh")
    areas(tmp_path / "a", "t", [0, 1], layers, **LABELS)
    found = _texts(tmp_path / "a")
    assert "2 others  16%" in found and not any(text.startswith(("i ", "j ")) for text in found)
    assert len(_where(tmp_path / "a", REST)) > 1_000
    assert leading(layers[1:]) == list("bcdjefghi")


def test_leading_layers_come_in_the_order_of_their_last_known_shares() -> None:
    assert leading([("a", [0.9, 0.1, math.nan]), ("b", [0.1, 0.9, 0.1])]) == ["b", "a"]
    assert leading([("a", [None]), ("b", [0.5])]) == ["a", "b"] and leading([]) == []


def test_a_given_order_fixes_colours_whatever_the_shares(tmp_path: Path) -> None:
    layers = [("a", [0.1, 0.1]), ("b", [0.7, 0.7]), ("c", [0.2, 0.2])]
    areas(tmp_path / "a", "t", [0, 1], layers, **LABELS, order=["a", "b"])
    lowest, above, rest = (_where(tmp_path / "a", colour) for colour in (BLUE, GREEN, REST))
    assert len(above) > 5 * len(lowest) and lowest[:, 0].mean() > above[:, 0].mean() > rest[:, 0].mean()
    assert "1 other  20%" in _texts(tmp_path / "a")


def test_an_absent_share_leaves_a_gap(tmp_path: Path) -> None:
    layers = [("a", [0.5] * 11), ("b", [0.5, 0.5, 0.5, 0.5, None, -1, math.nan, 0.5, 0.5, 0.5, 0.5])]
    areas(tmp_path / "a", "t", list(range(11)), layers, **LABELS)
    columns = np.unique(_where(tmp_path / "a", BLUE)[:, 1])
    steps = np.diff(columns)
    assert steps.max() > 0.3 * (columns[-1] - columns[0]) and (steps > 5).sum() == 1


def test_lines_stand_above_on_the_same_scale_and_are_named(tmp_path: Path) -> None:
    lines = [Series("augmented", [0, 1], [0.0, 0.9]), Series("planned", [0, 1], [0.1, 0.8], theory=True)]
    areas(tmp_path / "a", "t", [0, 1], [("a", [1, 1])], **LABELS, lines=lines, lines_label="share")
    found = _texts(tmp_path / "a")
    assert {"augmented", "planned", "share", "epoch", "chosen"} <= set(found)
    assert found.count("0%") == found.count("100%") == 2


def test_one_place_is_as_wide_as_a_step(tmp_path: Path) -> None:
    areas(tmp_path / "a", "t", [4], [("a", [1.0])], **LABELS, lines=[Series("b", [4], [0.5])])
    columns = _where(tmp_path / "a", BLUE)[:, 1]
    assert columns.max() - columns.min() > 600
    assert [text for text in _texts(tmp_path / "a") if text in ("3.5", "4", "4.5")] == ["4"]


def test_values_that_are_too_few_and_names_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 values of 'a' over 2 places"):
        areas(tmp_path / "a", "t", [0, 1], [("a", [1])], **LABELS)
    with pytest.raises(ValueError, match="'b'"):
        areas(tmp_path / "a", "t", [0], [("a", [1])], **LABELS, order=["b"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("values", [[], [None], [math.inf, 0.5], [0.0, 0.0], [1e300, 1e-300], [7.0, 0.1]])
def test_areas_of_any_numbers_are_drawn(tmp_path: Path, values: list[Any]) -> None:
    x = [float(place) for place in range(len(values))]
    lines = [Series("line", x, values)]
    areas(tmp_path / "a", "t", x, [("a", values), ("b", [0.5] * len(values))], **LABELS, lines=lines)
    areas(tmp_path / "a", "t", x, [], **LABELS)
    areas(tmp_path / "a", "t", [2.0] * len(values), [("a", values)], **LABELS)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1, 4), min_size=1, max_size=10), st.floats(0.05, 0.3))
@example([3.0] * 9, 0.19)
def test_names_are_moved_apart_as_little_as_they_can_be(wanted: list[float], least: float) -> None:
    wanted = sorted(wanted)
    found = apart(wanted, least, 3.0)
    steps = least * np.arange(len(wanted))
    regression = IsotonicRegression(y_min=0.0, y_max=3.0 - steps[-1])
    expected = regression.fit_transform(np.arange(len(wanted)), np.array(wanted) - steps) + steps
    assert found == pytest.approx(list(expected), abs=1e-9)
    assert all(later - earlier >= least - 1e-9 for earlier, later in pairwise(found))


def test_names_that_have_no_room_reach_beyond_it() -> None:
    assert apart([0.5, 0.5, 0.5], 1.0, 1.0) == [0.0, 1.0, 2.0] and apart([], 1.0, 1.0) == []
