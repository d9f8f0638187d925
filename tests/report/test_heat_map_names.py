"""Names beside heat maps: whole where they fit, aslant where they are long, fewer where there are many."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pomona.report.heatmaps import HeatMap, heat_maps

LABELS = {"x_label": "time", "y_label": "block", "scale_label": "accuracy"}
BLOCKS = ["stem", *(f"d{level}r{place}" for level in range(6) for place in range(3)), "mid"]
BLOCKS += [f"u{level}r{place}" for level in range(6) for place in range(3)][:17]


def _drawn(stem: Path, maps: list[HeatMap]) -> tuple[list[str], list[str], float]:
    """The texts of the figure in their order, those of them aslant, and its width in points."""
    heat_maps(stem, "t", maps, **LABELS)
    source = stem.with_suffix(".svg").read_text(encoding="utf-8")
    texts = re.findall(r"<!-- (.*?) -->", source)
    aslant = re.findall(r"<!-- ([^>]*?) -->\s*<g [^>]*rotate\(-45", source)
    return texts, aslant, float(ElementTree.fromstring(source).attrib["width"].removesuffix("pt"))


def _values(rows: int, columns: int) -> list[list[float | None]]:
    return [[float(row - column) for column in range(columns)] for row in range(rows)]


def test_short_names_stand_upright_in_place_of_numbers(tmp_path: Path) -> None:
    times = ["7", "70", "700"]
    texts, aslant, _ = _drawn(tmp_path / "m", [HeatMap("a", _values(3, 3), ["stem", "d0r0", "mid"], times)])
    # before the labels of the axes come the columns from the left and the rows from the top
    assert [text for text in texts if text in times] == times and not aslant
    assert [text for text in texts if text in BLOCKS] == ["stem", "d0r0", "mid"]


def test_one_side_may_be_named_and_the_other_numbered(tmp_path: Path) -> None:
    texts, _, _ = _drawn(tmp_path / "m", [HeatMap("a", [[5.0] * 3] * 2, row_names=["stem", "mid"])])
    assert {"stem", "mid", "0", "1", "2"} <= set(texts)


def test_long_names_of_columns_are_aslant_and_the_figure_grows_for_those_of_rows(tmp_path: Path) -> None:
    long = [f"up_blocks.{place}.resnets" for place in range(4)]
    texts, aslant, wide = _drawn(tmp_path / "long", [HeatMap("a", _values(4, 4), long, long)])
    assert aslant == long and all(texts.count(name) == 2 for name in long)
    _, _, narrow = _drawn(tmp_path / "short", [HeatMap("a", _values(4, 4), list("abcd"), list("abcd"))])
    assert wide > narrow + 60


def test_every_other_of_many_blocks_is_named_and_all_of_twenty(tmp_path: Path) -> None:
    texts, aslant, _ = _drawn(tmp_path / "all", [HeatMap("a", _values(37, 37), BLOCKS, BLOCKS)])
    assert len(BLOCKS) == 37 and aslant == BLOCKS[::2]
    assert [text for text in texts if text in BLOCKS] == BLOCKS[::2] * 2
    texts, _, _ = _drawn(tmp_path / "some", [HeatMap("a", _values(20, 8), BLOCKS[:20], list("abcdefgh"))] * 3)
    assert [text for text in texts if text in BLOCKS] == BLOCKS[:20] * 3


def test_endless_names_are_cut_and_hostile_ones_harmless(tmp_path: Path) -> None:
    texts, _, wide = _drawn(tmp_path / "m", [HeatMap("a", [[1.0], [2.0]], ["x" * 900, "$\\frac$\n<script>"])])
    assert wide < 500 and any(text.startswith("xxx") and len(text) == 24 for text in texts)


@pytest.mark.parametrize("names", [{"row_names": ["a"]}, {"column_names": ["a", "b", "c"]}])
def test_names_that_are_too_few_or_too_many_are_refused(tmp_path: Path, names: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"[13] names of 2 (rows|columns)"):
        heat_maps(tmp_path / "m", "t", [HeatMap("a", _values(2, 2), **names)], **LABELS)
    assert not list(tmp_path.iterdir())
