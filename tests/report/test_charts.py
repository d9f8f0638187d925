"""Figures: the same bytes, legible without colour, harmless, and drawn from any numbers."""

from __future__ import annotations

import hashlib
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pomona.errors import OutputError
from pomona.report import barcharts
from pomona.report.areas import areas
from pomona.report.barcharts import bars
from pomona.report.canvas import drawable
from pomona.report.charts import Panel, Series, curves
from pomona.report.dots import Dots, dots
from pomona.report.frame import COLOURS, look
from pomona.report.heatmaps import HeatMap, heat_maps
from pomona.report.ticks import brief, ends, number, numbers, ticks

KERNELS = [
    *("exp", "linear", "pow:2", "pow:4", "pow:8", "pow:16", "elu1", "taylor2"),
    *("favor:64", "favor:256", "favor:1024", "polysketch:4", "hedgehog", "uniform"),
]
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "$x^2$ \\alpha & <b>漢字</b> --> \x1b[31m\x00 \ud800 \u202e ]]> \ufffe"


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _panels(count: int = 3, labels: list[str] = KERNELS) -> list[Panel]:
    x = [128, 256, 512, 1024, 2048, 4096, 8192]
    panels = []
    for place in range(count):
        lines = []
        for rank, label in enumerate(labels):
            y = [0.01 * n * (1 + rank) ** (place % 2) for n in x]
            lines.append(Series(label, x, y, [v * 0.9 for v in y], [v * 1.1 for v in y]))
            lines.append(Series(label, x, [v * 1.05 for v in y], theory=True))
        panels.append(Panel(f"Panel {place}", "length, tokens", "ms", lines, log_x=True, log_y=True))
    return panels


def _draw_all(folder: Path, text: str = "plain") -> list[str]:
    """One of every kind of figure, with `text` wherever text may stand; their stems."""
    series = Series(text, [1, 2, 4], [1, 2, 3], [0.5, 1, 2], [2, 3, 4])
    one = Panel(
        text, text, text, [series, Series(text, [1, 4], [1, 3], theory=True)], verticals=[(2, text), (2.1, text)]
    )
    curves(folder / "curves", text, [one, *_panels(2)])
    heat_maps(
        folder / "maps",
        text,
        [HeatMap(text, [[1.0, None], [3.0, 4.0]]), HeatMap("other", [[0.5] * 9] * 30)],
        x_label=text,
        y_label=text,
        scale_label=text,
    )
    bars(folder / "bars", text, [text, "elu1"], [(text, [1, None]), ("other", [2, 0])], y_label=text, log_y=True)
    shares = [(text, [0.5, 0.2]), ("other", [0.5, 0.8])]
    areas(folder / "areas", text, [0, 1], shares, x_label=text, y_label=text, lines=[series], lines_label=text)
    dots(
        folder / "dots", text, [text, "b"], [Dots(text, [1, None], [0, 1], [2, 3])], x_label=text,
        beside=(text, [text, "1"]), note=text,
    )  # fmt: skip
    return ["curves", "maps", "bars", "areas", "dots"]


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_same_numbers_give_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    stems = _draw_all(tmp_path / "here")
    code = "import sys, pathlib; from report_charts import _draw_all; _draw_all(pathlib.Path(sys.argv[1]))"
    (tmp_path / "report_charts.py").write_bytes(Path(__file__).read_bytes())
    paths = os.pathsep.join([str(tmp_path), *map(str, filter(None, sys.path))])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True, env=environment)
    names = sorted(f"{stem}.{kind}" for stem in stems for kind in ("png", "svg"))
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == names
    for name in names:
        first, second = (hashlib.sha256((tmp_path / at / name).read_bytes()).digest() for at in ("here", "there"))
        assert first == second, name


def test_png_and_svg_have_the_same_size(tmp_path: Path) -> None:
    for stem in _draw_all(tmp_path):
        root = ElementTree.parse(tmp_path / f"{stem}.svg").getroot()
        points = [float(root.attrib[side].removesuffix("pt")) for side in ("width", "height")]
        with Image.open(tmp_path / f"{stem}.png") as image:
            image.load()
            assert image.size == pytest.approx([2 * side for side in points], abs=1.5)  # 144 dots an inch
            assert np.asarray(image.convert("L")).std() > 5


@pytest.mark.parametrize("text", ["plain", HOSTILE])
def test_an_svg_is_well_formed_and_asks_for_nothing(tmp_path: Path, text: str) -> None:
    for stem in _draw_all(tmp_path, text):
        source = (tmp_path / f"{stem}.svg").read_text(encoding="utf-8")
        assert "<!DOCTYPE" not in source and "<!ENTITY" not in source
        for element in ElementTree.fromstring(source).iter():
            assert element.tag.rpartition("}")[2] not in ("script", "foreignObject", "image", "a", "text")
            for name, value in element.attrib.items():
                assert not name.lower().startswith("on")
                assert "href" not in name or value.startswith("#")
                assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", value))


def test_an_svg_holds_its_labels_and_describes_itself(tmp_path: Path) -> None:
    curves(tmp_path / "c", "Time by length", _panels())
    root = ElementTree.parse(tmp_path / "c.svg").getroot()
    assert root.findtext(f"{SVG}title") == "Time by length"
    described = next(e.text for e in root.iter() if e.tag.endswith("}description"))
    assert described is not None and described.split("; ") == [*KERNELS, "theory, in the same colour"]
    outlined = set(re.findall(r"<!-- (.*?) -->", (tmp_path / "c.svg").read_text()))
    assert {*KERNELS, "Panel 0", "Panel 2", "length, tokens", "ms", "128", "512", "8,192"} <= outlined


def test_there_is_one_legend_whatever_the_panels(tmp_path: Path) -> None:
    curves(tmp_path / "c", "t", _panels(6))
    source = (tmp_path / "c.svg").read_text()
    assert all(source.count(f"<!-- {kernel} -->") == 1 for kernel in KERNELS)


def test_text_of_users_is_no_mathematics(tmp_path: Path) -> None:
    bad = "$\\frac$"  # would be refused as mathematics
    curves(tmp_path / "c", bad, [Panel(bad, "$x_1$", bad, [Series(bad, [1], [1])], verticals=[(1, bad)])])
    heat_maps(tmp_path / "m", bad, [HeatMap(bad, [[1.0]])], x_label=bad, y_label=bad, scale_label=bad)
    bars(tmp_path / "b", bad, [bad], [(bad, [1]), (bad, [2])], y_label=bad)
    assert {bad, "$x_1$"} <= set(re.findall(r"<!-- (.*?) -->", (tmp_path / "c.svg").read_text()))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
@example("\t\n\r\u200b\u202e\u2028 x")
def test_drawable_text_is_one_short_harmless_line(text: str) -> None:
    shown = drawable(text, 20)
    assert len(shown) <= 20 and shown.isprintable()
    assert drawable("polysketch:4 \u03c6(x) = max(x, 0)\u00b2 漢") == "polysketch:4 \u03c6(x) = max(x, 0)\u00b2 \ufffd"


def test_a_refused_figure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "c.svg").mkdir()
    with pytest.raises(OutputError):
        curves(tmp_path / "c", "t", _panels(1))
    assert (tmp_path / "c.svg").is_dir() and not list(tmp_path.glob(".*"))


def test_a_name_with_dots_is_kept(tmp_path: Path) -> None:
    bars(tmp_path / "a1.5", "t", ["g"], [("s", [1])], y_label="y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a1.5.png", "a1.5.svg"]


# --- what tells series apart -----------------------------------------------------------------------------------------


def _lightness(colour: str) -> float:
    """CIE L*, 0 for black to 100 for white."""
    linear = []
    for start in (1, 3, 5):
        c = int(colour[start : start + 2], 16) / 255
        linear.append(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_fourteen_series_have_fourteen_marks_and_no_two_are_drawn_alike_without_colour() -> None:
    looks = [look(place) for place in range(14)]
    assert len({each.marker for each in looks}) == 14
    grey = [(each.marker, str(each.dashes), each.hollow) for each in map(look, range(28))]
    assert len(set(grey)) == 28
    assert len({(each.colour, str(each.dashes), each.hollow) for each in looks}) == 14


def test_neighbours_differ_in_lightness_and_all_stand_out_from_the_paper() -> None:
    light = [_lightness(colour) for colour in COLOURS]
    assert max(light) < 75  # white is 100
    assert all(abs(a - b) > 5 for a, b in zip(light, [*light[1:], light[0]], strict=True))


def test_bars_side_by_side_differ_in_hatching() -> None:
    looks = barcharts._bar_looks(7)
    assert all(first.hatch != second.hatch for first, second in combinations(looks, 2))


def _pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).reshape(-1, 3)


def _share(path: Path, colour: str) -> int:
    """Pixels of exactly this colour."""
    return int((_pixels(path) == [int(colour[start : start + 2], 16) for start in (1, 3, 5)]).all(axis=1).sum())


def test_a_label_has_one_colour_in_all_panels_also_where_it_comes_second(tmp_path: Path) -> None:
    def line(label: str) -> Series:
        return Series(label, [1, 2], [1, 2])

    curves(tmp_path / "c", "t", [Panel("p", "x", "y", [line("a"), line("b")]), Panel("q", "x", "y", [line("b")])])
    curves(tmp_path / "d", "t", [Panel("p", "x", "y", [line("a"), line("b")]), Panel("q", "x", "y", [])])
    assert _share(tmp_path / "c.png", COLOURS[1]) > 1.3 * _share(tmp_path / "d.png", COLOURS[1])


def test_many_points_are_a_band_and_two_are_bars(tmp_path: Path) -> None:
    def area(stem: str, x: list[float]) -> int:
        spread = Series("a", x, [1.0] * len(x), [0.0] * len(x), [2.0] * len(x))
        curves(tmp_path / stem, "t", [Panel("p", "x", "y", [spread])])
        pixels = _pixels(tmp_path / f"{stem}.png")
        tint = round(255 * 0.87)
        return int((np.abs(pixels.astype(int) - tint).max(axis=1) <= 1).sum())

    assert area("band", [1, 2, 3]) > 20_000 > 2_000 > area("bars", [1, 2])


# --- heat maps -------------------------------------------------------------------------------------------------------


def test_maps_share_one_scale_and_rows_start_at_the_top(tmp_path: Path) -> None:
    from matplotlib import colormaps

    maps = [HeatMap("a", [[0.0] * 20] * 20), HeatMap("b", [[10.0] * 20] * 5 + [[5.0] * 20] * 15)]
    heat_maps(tmp_path / "m", "t", maps, x_label="head", y_label="layer", scale_label="KL")
    with Image.open(tmp_path / "m.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    rows: dict[float, Any] = {}
    for share in (0.0, 0.5, 1.0):
        colour = [round(255 * c) for c in colormaps["viridis"](share)[:3]]
        at = np.argwhere(np.abs(pixels - colour).max(axis=2) <= 1)
        middle = at[at[:, 1] < pixels.shape[1] * 0.75]  # left of the colour bar
        assert len(middle) > 3_000
        rows[share] = middle[:, 0].mean()
    assert rows[1.0] < rows[0.5]


def test_a_scale_may_reach_beyond_the_values(tmp_path: Path) -> None:
    from matplotlib import colormaps

    kept = {"x_label": "epoch", "y_label": "", "scale_label": "strength"}
    heat_maps(tmp_path / "m", "t", [HeatMap("a", [[0.25] * 20] * 20)], **kept, span=(0, 1))
    colour = "#" + "".join(f"{round(255 * channel):02x}" for channel in colormaps["viridis"](0.25)[:3])
    assert _share(tmp_path / "m.png", colour) > 20_000
    assert "<!-- 1.0 -->" in (tmp_path / "m.svg").read_text()


def test_absent_values_are_hatched_and_said_to_be_so(tmp_path: Path) -> None:
    kept = {"x_label": "head", "y_label": "layer", "scale_label": "KL"}
    heat_maps(tmp_path / "a", "t", [HeatMap("a", [[1.0, None], [2.0, 3.0]])], **kept)
    heat_maps(tmp_path / "b", "t", [HeatMap("a", [[1.0, 1.5], [2.0, 3.0]])], **kept)
    assert _share(tmp_path / "a.png", "#EDEFF1") > 1_000 and _share(tmp_path / "b.png", "#EDEFF1") < 50
    first, second = ((tmp_path / f"{stem}.svg").read_text() for stem in "ab")
    assert "<!-- hatched: no value -->" in first and "hatched" not in second
    assert "<!-- 1.5 -->" in second and "<!-- 1.5 -->" not in first  # small maps show their numbers


# --- any numbers -----------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
ODD: list[tuple[list[Any], list[Any]]] = [
    ([], []),
    ([1], [2]),
    ([1, 2, 3], [5, 5, 5]),
    ([0, 0, 0], [0, 0, 0]),
    ([0, 1, 2], [0, -1, 3]),
    ([1, 2, 3], [NAN, INF, None]),
    ([1e-300, 1e-100, 1, 1e100, 1e300], [1e300, 1, 1e-100, 1e-320, -1e308]),
    ([1, 2, 3], [1 + 1e-15, 1, 1 - 1e-15]),
    ([1e9 + 1, 1e9 + 2], [1e-9, 2e-9]),
    ([3, 1, 2], [1, 2, 3]),
    (list(range(500)), [math.sin(n) for n in range(500)]),
]


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("log_x", [False, True])
def test_curves_of_any_numbers_are_drawn(tmp_path: Path, log_x: bool, log_y: bool) -> None:
    panels = []
    for x, y in ODD:
        lines = [
            Series("exp", x, y, low=[v and v * 0.5 for v in y], high=[v and v * 2 for v in y]),
            Series("exp", x, y, theory=True),
            Series("elu1", x[:1], y[:1], low=y[:1], high=y[:1]),
        ]
        verticals = [(0.0, "zero"), (INF, "far"), (2.0, "two"), (2.0, "again")]
        panels.append(Panel("odd", "x", "y", lines, log_x=log_x, log_y=log_y, verticals=verticals))
        panels.append(Panel("odd", "x", "y", lines, log_x=log_x, log_y=log_y, y_range=(0, 0)))
    curves(tmp_path / "c", "odd", panels, columns=4)
    curves(tmp_path / "none", "", [])
    curves(tmp_path / "bare", "", [Panel("", "", "", [])], columns=0)


def test_what_a_log_axis_cannot_show_is_counted_in_the_panel(tmp_path: Path) -> None:
    lines = [Series("a", [0, 1, 2, 3], [1, 0, 2, NAN]), Series("b", [1, 2, 3, 4], [-1, 1, 1, 1])]
    curves(tmp_path / "c", "t", [Panel("p", "x", "y", lines, log_x=True, log_y=True), Panel("q", "x", "y", lines)])
    source = (tmp_path / "c.svg").read_text()
    assert source.count("<!-- left out: 3 at or below 0, 1 without a value -->") == 1
    assert source.count("<!-- left out: 1 without a value -->") == 1


@pytest.mark.parametrize(
    "values",
    [
        *([], [[]], [[], [1.0]], [[1.0]], [[0.0, 0.0]], [[None]], [[NAN, INF]], [[1e-300, 1e300]], [[1.0], [1.0, 2.0]]),
        *([[-1e199, 1e199]], [[1.0] * 200] * 100),
    ],
)
def test_maps_of_any_values_are_drawn(tmp_path: Path, values: Any) -> None:
    kept = {"x_label": "head", "y_label": "layer", "scale_label": "KL"}
    heat_maps(tmp_path / "m", "t", [HeatMap("elu1", values)], **kept)
    heat_maps(tmp_path / "m", "t", [HeatMap("elu1", values), HeatMap("exp", [[0.5]])] * 2, **kept)
    heat_maps(tmp_path / "n", "t", [], **kept)


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "heights", [[], [1], [0, 0], [None, NAN], [-1, -2], [1e-300, 1e300], [5, 5], [1e-9, 1e9], [-1, 1], [-1, 0]]
)
def test_bars_of_any_heights_are_drawn(tmp_path: Path, heights: list[Any], log_y: bool) -> None:
    groups = [f"polysketch:{place}" for place in range(len(heights))]
    bars(tmp_path / "b", "t", groups, [("one", heights), ("two", heights[::-1])], y_label="KL, nats", log_y=log_y)
    bars(tmp_path / "b", "t", groups, [("one", heights)], y_label="KL, nats", log_y=log_y)
    bars(tmp_path / "b", "t", groups, [], y_label="KL, nats", log_y=log_y)


# --- the numbers on axes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        *((128, "128"), (1024, "1,024"), (8192, "8,192"), (1e6, "1,000,000"), (0.1 + 0.2, "0.3"), (-0.5, "−0.5")),
        *((1e7, "10⁷"), (2.5e-6, "2.5×10⁻⁶"), (-1e-12, "−10⁻¹²"), (0, "0"), (-3e8, "−3×10⁸"), (0.0001, "0.0001")),
    ],
)
def test_numbers_are_written_as_people_write_them(value: float, said: str) -> None:
    assert number(value) == said


def test_the_ticks_of_an_axis_are_written_alike() -> None:
    assert numbers([0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert numbers([0.001, 0.1, 10, 1000]) == ["0.001", "0.1", "10", "1,000"]
    assert numbers([1e4, 1e8]) == ["10⁴", "10⁸"]
    assert numbers([]) == []
    assert (brief(1115400.4), brief(0.30712), brief(-0.5)) == ("1,115,400", "0.307", "−0.5")
    assert (brief(0.00034217), brief(0.0027), brief(3.14159e-6)) == ("0.000342", "0.0027", "3.14×10⁻⁶")


@given(st.floats(1e-4, 999.0), st.sampled_from([1, -1]))
def test_brief_is_right_to_three_digits(value: float, sign: int) -> None:
    said = brief(sign * value).replace("−", "-")
    assert float(said) == pytest.approx(sign * value, rel=0.5e-2)
    assert len(said.lstrip("-0.").replace(".", "")) <= 3


def test_ticks_stand_at_measured_lengths() -> None:
    lengths = [2**power for power in range(7, 14)]
    assert ticks(100, 10_000, lengths, 4, log=True) == [128, 512, 2048, 8192]
    assert ticks(0, 20, [4, 8, 16], 5, log=False) == [4, 8, 16]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(1e-200, 1e200), max_size=8),
    st.booleans(),
    st.integers(2, 6),
    st.booleans(),
)
def test_ends_hold_all_values_and_ticks_lie_between_in_order(
    values: list[float], log: bool, most: int, negative: bool
) -> None:
    if negative and not log:
        values = [-value for value in values]
    low, high = ends(values, log=log)
    assert low < high and math.isfinite(low) and math.isfinite(high) and (low > 0 or not log)
    assert all(low <= value <= high for value in values)
    found = ticks(low, high, values, most, log=log)
    slack = (high - low) * 1e-8
    assert found == sorted(found) and all(low - slack <= place <= high + slack for place in found)
    assert 0 < len(found) <= most + 2
