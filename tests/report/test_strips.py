"""Strips of images: every pixel of every image, in its place, in both files."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pomona.report.strips import strips

FRAME = [0xB9, 0xBE, 0xC4]


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _images(rows: int, columns: int, channels: int, height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (rows, columns, channels, height, width), dtype=np.uint8)


def _png(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _embedded(path: Path) -> list[NDArray[np.uint8]]:
    coded = re.findall(r'href="data:image/png;base64,([^"]*)"', path.read_text(encoding="utf-8"))
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in coded]


def _places(sheet: NDArray[np.uint8], image: NDArray[Any]) -> list[tuple[int, int]]:
    """Where `image` (height, width, 3) stands in `sheet` exactly, within its frame."""
    height, width = image.shape[:2]
    corner = (sheet[:-1, :-1] == FRAME).all(axis=2) & (sheet[1:, 1:] == image[0, 0]).all(axis=2)
    return [
        (int(y), int(x))
        for y, x in np.argwhere(corner)
        if np.array_equal(sheet[y + 1 : y + 1 + height, x + 1 : x + 1 + width], image)
        and (sheet[y : y + height + 2, [x, x + width + 1]] == FRAME).all()
        and (sheet[[y, y + height + 1], x : x + width + 2] == FRAME).all()
    ]


def _enlarged(image: NDArray[np.uint8], times: int) -> NDArray[np.uint8]:
    """By Pillow, nearest."""
    pixels = np.moveaxis(image, 0, 2)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    size = (picture.width * times, picture.height * times)
    return np.asarray(picture.resize(size, Image.Resampling.NEAREST))


@pytest.mark.parametrize(
    ("channels", "height", "width", "times"), [(1, 8, 8, 7), (3, 32, 32, 2), (1, 28, 20, 2), (3, 96, 64, 1)]
)
def test_every_image_stands_pixel_by_pixel_in_its_row_and_group(
    tmp_path: Path, channels: int, height: int, width: int, times: int
) -> None:
    images = _images(2, 3, channels, height, width)
    strips(tmp_path / "s", "t", [("first", images[:, :1]), ("then", images[:, 1:])], ["a", "b"], note="n")
    sheet, embedded = _png(tmp_path / "s.png"), _embedded(tmp_path / "s.svg")
    found = {}
    for row, column in np.ndindex(2, 3):
        expected = _enlarged(images[row, column], times)
        (found[row, column],) = _places(sheet, expected)
        assert len(_places(embedded[column > 0], expected)) == 1
    assert found[0, 0][0] == found[0, 1][0] == found[0, 2][0] < found[1, 0][0]
    assert found[0, 0][1] == found[1, 0][1] < found[0, 1][1] < found[0, 2][1]
    steps = found[0, 1][1] - found[0, 0][1], found[0, 2][1] - found[0, 1][1]
    assert steps[0] > steps[1] + 10  # groups stand apart


def test_large_images_are_reduced_to_means_of_squares(tmp_path: Path) -> None:
    images = _images(1, 1, 3, 225, 150)
    strips(tmp_path / "s", "t", [("g", images)], ["a"])
    whole = np.moveaxis(images[0, 0], 0, 2).astype(int)
    sums = np.zeros((75, 50, 3), dtype=int)
    for down, across in np.ndindex(3, 3):
        sums += whole[down::3, across::3]
    assert len(_places(_png(tmp_path / "s.png"), np.rint(sums / 9))) == 1


def test_what_is_left_of_a_square_is_cut_off(tmp_path: Path) -> None:
    images = _images(1, 1, 1, 115, 223)
    strips(tmp_path / "s", "t", [("g", images)], ["a"])
    part = images[0, 0, 0, :114, :222].astype(int)
    means = (part[::2, ::2] + part[1::2, ::2] + part[::2, 1::2] + part[1::2, 1::2]) / 4
    assert len(_places(_png(tmp_path / "s.png"), np.repeat(np.rint(means)[..., None], 3, axis=2))) == 1


def test_titles_and_names_are_in_the_svg_which_asks_for_nothing(tmp_path: Path) -> None:
    hostile = "$x^2$ <b>漢字</b> --> \x1b[31m\x00 \ud800"
    images = _images(2, 2, 1, 8, 8)
    strips(tmp_path / "s", hostile, [("before", images), (hostile, images)], ["five", hostile], note=hostile)
    source = (tmp_path / "s.svg").read_text(encoding="utf-8")
    assert {"before", "five"} <= set(re.findall(r"<!-- (.*?) -->", source)) and "<!DOCTYPE" not in source
    for each in ElementTree.fromstring(source).iter():
        assert each.tag.rpartition("}")[2] not in ("script", "foreignObject", "a", "text")
        for name, value in each.attrib.items():
            assert "href" not in name or value.startswith(("#", "data:image/png;base64,"))


def test_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    images = _images(2, 2, 3, 8, 8)
    for stem in ("a", "b"):
        strips(tmp_path / stem, "t", [("g", images)], ["x", "y"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_both_files_have_the_same_size(tmp_path: Path) -> None:
    strips(tmp_path / "s", "t", [("g", _images(3, 4, 1, 8, 8))], list("abc"))
    root = ElementTree.parse(tmp_path / "s.svg").getroot()
    points = [float(root.attrib[side].removesuffix("pt")) for side in ("width", "height")]
    high, wide = _png(tmp_path / "s.png").shape[:2]
    assert [wide, high] == pytest.approx([2 * side for side in points], abs=1)  # 144 dots an inch


def test_groups_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    first, other = _images(2, 1, 1, 8, 8), _images(2, 1, 1, 9, 8)
    for groups, names in (([("g", first)], ["a"]), ([("g", first), ("h", other)], ["a", "b"])):
        with pytest.raises(ValueError, match="names"):
            strips(tmp_path / "s", "t", groups, names)
    assert not list(tmp_path.iterdir())


def test_nothing_is_said_to_be_nothing(tmp_path: Path) -> None:
    strips(tmp_path / "s", "t", [], [])
    strips(tmp_path / "e", "t", [("g", _images(1, 0, 1, 8, 8))], ["a"])
    assert all("nothing to show" in (tmp_path / f"{stem}.svg").read_text() for stem in "se")


def test_channels_may_differ_between_groups_of_one_size(tmp_path: Path) -> None:
    grey, colour = _images(1, 1, 1, 8, 8), _images(1, 1, 3, 8, 8)
    strips(tmp_path / "s", "t", [("g", grey), ("h", colour)], ["a"])
    sheet = _png(tmp_path / "s.png")
    assert len(_places(sheet, _enlarged(grey[0, 0], 7))) == len(_places(sheet, _enlarged(colour[0, 0], 7))) == 1
