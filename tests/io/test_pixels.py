"""Pixels: the released code's transform, and every way in which files keep an image."""

from __future__ import annotations

import io
import math
import os
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pomona.errors import UnavailableError
from pomona.io.pixels import LARGEST, Unreadable, cropped, pixels, size_of


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth shapes with some noise, as photographs have."""
    noise = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / min(height, width)
    waves = [np.sin(noise.uniform(3, 20) * x + noise.uniform(3, 20) * y) for _ in range(channels)]
    return (
        (110 + 90 * np.stack(waves, -1) + noise.normal(0, 6, (height, width, channels))).clip(0, 255).astype(np.uint8)
    )


def encoded(array: NDArray[Any] | Image.Image, format: str, **options: Any) -> bytes:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array.squeeze())
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def released(array: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """guided-diffusion's test transform, by its description."""
    image = Image.fromarray(array.squeeze())
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    whole = np.asarray(image).reshape(image.height, image.width, -1)
    top, left = (whole.shape[0] - size) // 2, (whole.shape[1] - size) // 2
    return whole[top : top + size, left : left + size]


# --- scaling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "size"), [(97, 64, 32), (64, 97, 20), (130, 75, 16), (75, 131, 7), (33, 40, 64), (50, 50, 50)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_scaled_and_cropped_pixels_are_those_of_the_released_transform(
    height: int, width: int, size: int, channels: int
) -> None:
    array = photo(height, width, channels)
    expected = released(array, size)
    for content in (encoded(array, "PNG"), array):
        found = pixels(content, channels=channels, size=size)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)


def test_a_jpeg_that_is_not_halved_is_scaled_by_the_released_transform() -> None:
    data = encoded(photo(75, 100), "JPEG", quality=90)
    np.testing.assert_array_equal(
        pixels(data, channels=3, size=40), released(np.asarray(Image.open(io.BytesIO(data))), 40)
    )


@pytest.mark.parametrize(("height", "width", "size"), [(512, 768, 64), (515, 771, 64), (515, 771, 130), (771, 515, 40)])
def test_a_jpeg_that_its_decoder_halves_is_as_the_released_transform_but_for_a_level_or_three(
    height: int, width: int, size: int
) -> None:
    data = encoded(photo(height, width), "JPEG", quality=90, subsampling=0)
    expected = released(np.asarray(Image.open(io.BytesIO(data))), size).astype(int)
    found = pixels(data, channels=3, size=size).astype(int)
    assert 0 < np.abs(found - expected).mean() < 3
    one_off = np.abs(np.roll(expected, 1, axis=1) - expected).mean()
    assert np.abs(found - expected).mean() < one_off / 4  # and it lies in the same place


def test_without_a_size_every_pixel_stays() -> None:
    array = photo(13, 21)
    found = pixels(encoded(array, "PNG"), channels=3, size=None)
    np.testing.assert_array_equal(found, array)
    assert found.flags.writeable and found.flags.c_contiguous


def test_pixels_of_an_array_are_its_own_no_longer() -> None:
    array = photo(8, 8, 1)
    pixels(array, channels=1, size=8)[...] = 7
    np.testing.assert_array_equal(array, photo(8, 8, 1))


def test_an_image_too_narrow_to_scale_is_refused_before_memory_is_taken() -> None:
    with pytest.raises(Unreadable, match="so narrow that it would have"):
        pixels(np.zeros((1, 60_000), np.uint8), channels=1, size=256)


# --- random crops ----------------------------------------------------------------------------------------------------


def test_random_crops_keep_80_to_100_percent_of_the_short_side_and_reach_every_place() -> None:
    size, side = 64, 128
    ramp = np.tile(np.linspace(0, 255, side), (side, 1))
    both = np.stack([ramp, ramp.T, np.zeros_like(ramp)], -1).round().astype(np.uint8)  # x and y as colours
    shares, lefts, tops = [], [], []
    for seed in range(150):
        crop = cropped(both, channels=3, size=size, seed=seed, mirror=False).astype(float)
        span = (crop[size // 2, -1, 0] - crop[size // 2, 0, 0]) / 255 * side
        shares.append(span / (side * (size - 1) / size))
        lefts.append(crop[size // 2, 0, 0])
        tops.append(crop[0, size // 2, 1])
    assert 0.77 < min(shares) < 0.83 and 0.97 < max(shares) < 1.03
    assert abs(np.mean(shares) - 0.89) < 0.03  # the mean of 64 / n over n from 64 to 80
    assert min(lefts) < 4 and max(lefts) > 35 and min(tops) < 4 and max(tops) > 35
    assert abs(np.corrcoef(lefts, tops)[0, 1]) < 0.6


def test_half_of_the_crops_are_mirrored_and_the_rest_of_the_draw_stays() -> None:
    array = photo(40, 50)
    mirrored = 0
    for seed in range(60):
        plain = cropped(array, channels=3, size=32, seed=seed, mirror=False)
        other = cropped(array, channels=3, size=32, seed=seed, mirror=True)
        turned = not np.array_equal(plain, other)
        np.testing.assert_array_equal(plain[:, ::-1] if turned else plain, other)
        mirrored += turned
    assert 18 <= mirrored <= 42


def test_a_crop_without_a_size_has_the_size_of_the_image() -> None:
    assert cropped(photo(9, 14, 1), channels=1, size=None, seed=4, mirror=True).shape == (9, 14, 1)


def test_threads_give_the_same_crops_as_one() -> None:
    data = encoded(photo(300, 200), "JPEG")

    def crop(seed: int) -> bytes:
        return cropped(data, channels=3, size=48, seed=seed, mirror=True).tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(crop, range(64))) == list(map(crop, range(64)))


# --- what files hold -------------------------------------------------------------------------------------------------

UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_upright_as_exif_says(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    data = encoded(photo(24, 36), format, exif=exif, **options)
    plain = pixels(encoded(photo(24, 36), format, **options), channels=3, size=None)
    expected = UPRIGHT[orientation](plain)
    np.testing.assert_array_equal(pixels(data, channels=3, size=None), expected)
    assert size_of(data) == (expected.shape[1], expected.shape[0], 3)
    difference = pixels(data, channels=3, size=18).astype(int) - released(np.ascontiguousarray(expected), 18)
    assert np.abs(difference).max() <= 1


def on_black(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    exact = rgba[..., :3].astype(float) * rgba[..., 3:] / 255
    return exact.round().astype(np.uint8)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "array"])
def test_alpha_lies_on_black(format: str) -> None:
    rgba = np.random.default_rng(1).integers(0, 256, (12, 9, 4), dtype=np.uint8)
    rgba[..., 3] = np.maximum(rgba[..., 3], 1)  # what is fully clear has no colour in WebP
    content = rgba if format == "array" else encoded(rgba, format, **({"lossless": True} if format == "WEBP" else {}))
    found = pixels(content, channels=3, size=None).astype(int)
    assert np.abs(found - on_black(rgba)).max() <= 1


def test_a_palette_with_clear_colours_lies_on_black() -> None:
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) % 4)
    image.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250, 250, 250, 250])
    colours = np.array([[250, 0, 0, 255], [0, 250, 0, 0], [0, 0, 250, 128], [250, 250, 250, 255]], np.uint8)
    expected = on_black(colours[np.arange(16).reshape(4, 4) % 4])
    data = encoded(image.convert("P"), "PNG")
    palette = Image.open(io.BytesIO(data))
    palette.info["transparency"] = bytes([255, 0, 128, 255])
    found = pixels(encoded(palette, "PNG", transparency=bytes([255, 0, 128, 255])), channels=3, size=None).astype(int)
    assert np.abs(found - expected).max() <= 1
    one = pixels(encoded(palette, "GIF", transparency=0), channels=3, size=None)
    assert one[0, 0].tolist() == [0, 0, 0] and one[0, 1].tolist() == [0, 250, 0]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_keep_the_upper_eight(format: str) -> None:
    deep = np.array([[0, 255, 256, 32768], [65535, 65280, 513, 40000]], np.uint16)
    data = b"P5 4 2 65535\n" + deep.astype(">u2").tobytes() if format == "PPM" else encoded(deep, format)
    assert size_of(data) == (4, 2, 1)
    np.testing.assert_array_equal(pixels(data, channels=1, size=None)[..., 0], deep >> 8)
    np.testing.assert_array_equal(pixels(data, channels=3, size=None)[..., 2], deep >> 8)


def test_cmyk_is_shown_as_colour() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert size_of(data) == (16, 16, 3)
    assert np.abs(pixels(data, channels=3, size=None).astype(int) - [255, 0, 0]).max() <= 8


def test_bits_are_black_and_white() -> None:
    bits = np.eye(8, dtype=bool)
    found = pixels(encoded(Image.fromarray(bits), "PNG"), channels=1, size=None)
    np.testing.assert_array_equal(found[..., 0], bits * 255)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (pixels(data, channels=3, size=None) == [255, 0, 0]).all()


def test_grey_is_repeated_and_colour_is_never_made_grey() -> None:
    grey = photo(10, 10, 1)
    np.testing.assert_array_equal(pixels(encoded(grey, "PNG"), channels=3, size=None), np.repeat(grey, 3, axis=2))
    for content in (encoded(photo(10, 10), "PNG"), photo(10, 10)):
        with pytest.raises(Unreadable, match="colour, and the model takes grey"):
            pixels(content, channels=1, size=None)
    for same in (np.repeat(grey, 3, axis=2), encoded(np.repeat(grey, 3, axis=2), "PNG")):
        np.testing.assert_array_equal(pixels(same, channels=1, size=None), grey)


def test_a_grey_palette_is_grey() -> None:
    image = Image.fromarray(photo(10, 10, 1)[..., 0]).quantize(16)
    data = encoded(image, "PNG")
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert size_of(data) == (10, 10, 1)
    assert pixels(data, channels=1, size=None).shape == (10, 10, 1)
    assert size_of(encoded(Image.fromarray(photo(10, 10)).quantize(16), "PNG")) == (10, 10, 3)


def test_numbers_without_a_white_are_refused() -> None:
    for deep in (np.ones((4, 4), np.float32), np.ones((4, 4), np.int32)):
        with pytest.raises(Unreadable, match="nothing says which is white"):
            pixels(encoded(deep, "TIFF"), channels=1, size=None)


# --- hostile files ---------------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    data = bytearray(encoded(np.zeros((2, 2), np.uint8), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"just some text, renamed", "not an image of a kind that is read"),
        (encoded(photo(64, 64), "PNG")[:-2000], "the file is cut off"),
        (encoded(photo(64, 64), "JPEG")[:-400], "the file is cut off"),
        (encoded(photo(64, 64), "JPEG")[:20], "damaged at its beginning"),
        (encoded(photo(64, 64), "PNG")[:12], "damaged at its beginning"),
        (png_header(60_000, 60_000), f"larger than {LARGEST:,} pixels"),
        (png_header(9_500, 9_500), f"larger than {LARGEST:,} pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image of a kind that is read"),
    ],
)
def test_what_cannot_be_read_says_why(content: bytes, reason: str, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(Unreadable) as raised:
        pixels(content, channels=3, size=32)
    assert str(raised.value) == reason
    assert not recwarn.list


def test_what_is_no_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "memory.png").symlink_to("/proc/self/mem")
    found = {}
    for name in (
        "pipe.png",
        "folder.png",
        "loop.png",
        "memory.png",
        "absent.png",
        "null\0byte.png",
        "long" * 100 + ".png",
    ):
        with pytest.raises(Unreadable) as raised:
            pixels(tmp_path / name, channels=3, size=None)
        found[name[:6]] = str(raised.value)
    assert found == {
        "pipe.p": "not a file",
        "folder": "not a file",
        "loop.p": "too many levels of symbolic links",
        "memory": "input/output error",
        "absent": "no such file or directory",
        "null\0b": "damaged: embedded null byte",
        "longlo": "file name too long",
    }


def damaged(seed: int) -> bytes:
    """A small image of some format with bytes changed, cut out, put in or cut off."""
    noise = np.random.default_rng(seed)
    format = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"][seed % 9]
    image = Image.fromarray(photo(20 + seed % 7, 24, seed=seed))
    exif = Image.Exif()
    exif[0x0112] = seed % 9
    options = {"exif": exif} if format in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    data = bytearray(
        encoded(image.quantize(8) if seed % 4 == 0 and format in ("PNG", "BMP") else image, format, **options)
    )
    for _ in range(1 + seed % 5):
        place = int(noise.integers(0, len(data) if seed % 2 else min(len(data), 120)))
        kind = noise.integers(0, 4)
        if kind == 0:
            data[place : place + 4] = noise.bytes(4)
        elif kind == 1:
            del data[place : place + int(noise.integers(1, 40))]
        elif kind == 2:
            data[place:place] = noise.bytes(int(noise.integers(1, 40)))
        elif seed % 3 == 0:
            del data[max(place, 8) :]
    return bytes(data)


def test_two_hundred_damaged_files_give_pixels_or_a_reason_and_no_warning(capfd: pytest.CaptureFixture[str]) -> None:
    def attempt(seed: int) -> str:
        try:
            found = pixels(damaged(seed), channels=3, size=16)
        except Unreadable as error:
            assert "\n" not in str(error) and str(error)
            return "unreadable"
        assert found.shape == (16, 16, 3) and math.isfinite(found.mean())
        return "read"

    attempt(0)  # puts the filter in its place before all warnings are caught
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(attempt, range(216)))
    assert not caught and capfd.readouterr() == ("", "")
    assert 40 < outcomes.count("read") < 200


def test_without_pillow_arrays_can_be_read_and_files_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(8, 8, 1), "PNG")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert pixels(photo(8, 8, 1), channels=3, size=8).shape == (8, 8, 3)
    for attempt in (
        lambda: pixels(data, channels=1, size=None),
        lambda: pixels(photo(8, 8, 1), channels=1, size=4),
        lambda: size_of(data),
    ):
        with pytest.raises(UnavailableError) as raised:
            attempt()
        assert "pomona[vision]" in str(raised.value.hint)
