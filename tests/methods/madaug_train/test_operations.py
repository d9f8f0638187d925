"""Operations on images: every pixel as Pillow has it, in batches and one by one, and what each magnitude means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor

from pomona.methods.madaug_train.operations import batched, by_pillow, placing
from pomona.methods.madaug_train.operations.batched import Chain
from pomona.methods.madaug_train.operations.table import OPERATIONS, Operation

NAMES = [operation.name for operation in OPERATIONS]


def moved(image: Image.Image, *map_: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, map_)


def hollow(image: Image.Image, v: float, centre: Sequence[float]) -> Image.Image:
    """CutoutAbs of the released code, whose hole is `v` wide."""
    if v <= 0:
        return image
    left, top = (int(max(0, at * side - v / 2)) for at, side in zip(centre, image.size, strict=True))
    image = image.copy()
    colour = (
        (125, 123, 114)
        if image.mode == "RGB"
        else Image.new("RGB", (1, 1), (125, 123, 114)).convert("L").getpixel((0, 0))
    )
    ImageDraw.Draw(image).rectangle((left, top, min(image.width, left + v), min(image.height, top + v)), colour)
    return image


REFERENCE: dict[str, Callable[[Image.Image, float, Sequence[float]], Image.Image]] = {
    "ShearX": lambda image, m, _: moved(image, 1, 0.6 * m - 0.3, 0, 0, 1, 0),
    "ShearY": lambda image, m, _: moved(image, 1, 0, 0, 0.6 * m - 0.3, 1, 0),
    "TranslateX": lambda image, m, _: moved(image, 1, 0, (0.9 * m - 0.45) * image.width, 0, 1, 0),
    "TranslateY": lambda image, m, _: moved(image, 1, 0, 0, 0, 1, (0.9 * m - 0.45) * image.height),
    "Rotate": lambda image, m, _: image.rotate(60 * m - 30),
    "AutoContrast": lambda image, m, _: ImageOps.autocontrast(image),
    "Invert": lambda image, m, _: ImageOps.invert(image),
    "Equalize": lambda image, m, _: ImageOps.equalize(image),
    "Solarize": lambda image, m, _: ImageOps.solarize(image, 256 * m),  # type: ignore[arg-type]
    "Posterize": lambda image, m, _: ImageOps.posterize(image, math.floor(4 + 4 * m)),
    "Contrast": lambda image, m, _: ImageEnhance.Contrast(image).enhance(0.1 + 1.8 * m),
    "Color": lambda image, m, _: ImageEnhance.Color(image).enhance(0.1 + 1.8 * m),
    "Brightness": lambda image, m, _: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * m),
    "Sharpness": lambda image, m, _: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * m),
    "Cutout": lambda image, m, centre: hollow(image, 0.2 * m * image.width, centre),
    "Flip": lambda image, m, _: ImageOps.mirror(image),
    "Identity": lambda image, m, _: image,
}


def by_reference(images: Tensor, name: str, magnitudes: Tensor, centres: Tensor) -> NDArray[np.uint8]:
    found = []
    for pixels, magnitude, centre in zip(images.numpy(), magnitudes.tolist(), centres.tolist(), strict=True):
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0).copy())
        changed = np.asarray(REFERENCE[name](image, magnitude, centre))
        found.append(changed[None] if changed.ndim == 2 else changed.transpose(2, 0, 1))
    return np.stack(found)


def alone(operation: Operation, images: Tensor, magnitudes: Any, centres: Tensor | None = None) -> Tensor:
    """The images under one operation, no sign turned."""
    n = len(images)
    magnitudes = torch.as_tensor(magnitudes, dtype=torch.float32).expand(n)
    middle = torch.full((n, 2), 0.5) if centres is None else centres
    chain = Chain(
        torch.zeros(n, 1, dtype=torch.int64), magnitudes[:, None], torch.zeros(n, 1, dtype=torch.bool), middle[:, None]
    )
    return batched.augmented(images, (operation, OPERATIONS[-1]), chain)


def named(name: str) -> Operation:
    return OPERATIONS[NAMES.index(name)]


def pictures(kind: str, n: int, channels: int, height: int, width: int, seed: int) -> Tensor:
    random = np.random.default_rng(seed)
    shape = (n, channels, height, width)
    if kind == "noise":
        found = random.integers(0, 256, shape)
    elif kind == "flat":
        found = np.broadcast_to(random.integers(0, 256, (n, channels, 1, 1)), shape)
    elif kind == "two levels":
        found = random.integers(0, 2, shape) * random.integers(1, 90) + random.integers(0, 150)
    else:
        found = np.clip(random.normal(100, 12, shape), 0, 255)
    return torch.from_numpy(np.ascontiguousarray(found, np.uint8))


def draws(n: int, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes with the ends and the middle among them, signs to turn, centres."""
    random = np.random.default_rng(seed)
    magnitudes = random.random((n, k), dtype=np.float32)
    ends = random.random((n, k))
    for share, end in ((0.1, 0), (0.2, 0.5), (0.3, 1)):
        magnitudes[(ends < share) & (ends >= share - 0.1)] = end
    mirrored, centres = random.random((n, k)) < 0.5, random.random((n, k, 2), dtype=np.float32)
    return torch.from_numpy(magnitudes), torch.from_numpy(mirrored), torch.from_numpy(centres)


@pytest.mark.parametrize("channels", [3, 1], ids=["colour", "grey"])
@pytest.mark.parametrize("name", NAMES)
def test_each_operation_gives_the_pixels_of_pillow(name: str, channels: int) -> None:
    """A1, and more: AutoContrast and Rotate too are equal in every bit."""
    images = pictures("noise", 64, channels, 32, 32, 1)
    magnitudes, _, centres = draws(64, 1, 2)
    wanted = by_reference(images, name, magnitudes[:, 0], centres[:, 0])
    found = alone(named(name), images, magnitudes[:, 0], centres[:, 0])
    np.testing.assert_array_equal(found.numpy(), wanted)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["noise", "flat", "two levels", "narrow"]),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_batches_and_pillow_give_the_same_bytes(kind: str, channels: int, height: int, width: int, seed: int) -> None:
    images = pictures(kind, 5, channels, height, width, seed)
    given = draws(5, len(OPERATIONS), seed + 1)
    both = [module.every(images, OPERATIONS, *given) for module in (batched, by_pillow)]
    different = (both[0] != both[1]).any(0).flatten(1).any(1)
    assert [name for name, differs in zip(NAMES, different.tolist(), strict=True) if differs] == []
    places = np.random.default_rng(seed).integers(-1, len(OPERATIONS), (5, 4))
    chain = Chain(torch.from_numpy(places), *(each[:, :4] for each in given))
    assert torch.equal(batched.augmented(images, OPERATIONS, chain), by_pillow.augmented(images, OPERATIONS, chain))


def test_rotation_is_that_of_pillow_at_every_tenth_of_a_degree() -> None:
    images = pictures("noise", 601, 1, 24, 31, 3)
    magnitudes = torch.arange(601) / 600
    wanted = by_reference(images, "Rotate", magnitudes, torch.zeros(601, 2))
    np.testing.assert_array_equal(alone(named("Rotate"), images, magnitudes).numpy(), wanted)


@pytest.mark.parametrize("side", [10, 30, 50, 9])
def test_shifts_by_half_a_pixel_round_as_pillow_rounds_them(side: int) -> None:
    images = pictures("noise", 41, 1, side, side, 4)
    magnitudes = ((torch.arange(41) - 20) / 2 / side / 0.9 + 0.5).clamp(0, 1)
    for name in ("TranslateX", "TranslateY"):
        wanted = by_reference(images, name, magnitudes, torch.zeros(41, 2))
        np.testing.assert_array_equal(alone(named(name), images, magnitudes).numpy(), wanted)


def test_autocontrast_rounds_as_double_precision_does_for_every_pair_of_ends() -> None:
    low, high = np.triu_indices(256, 1)
    level = np.clip(np.arange(256), low[:, None], high[:, None])
    scale = 255.0 / (high - low).astype(np.float64)
    wanted = np.clip(np.trunc(level * scale[:, None] + (-low * scale)[:, None]), 0, 255)
    images = torch.from_numpy(level.astype(np.uint8))[:, None, None]
    np.testing.assert_array_equal(alone(named("AutoContrast"), images, 0.5).numpy()[:, 0, 0], wanted)


def test_solarize_and_posterize_follow_their_formulas_at_every_level() -> None:
    levels = torch.arange(256, dtype=torch.uint8).repeat(257, 1)[:, None, None]
    level = np.arange(256)
    thresholds = torch.arange(257) / 256
    wanted = np.where(level < np.arange(257)[:, None], level, 255 - level)
    np.testing.assert_array_equal(alone(named("Solarize"), levels, thresholds).numpy()[:, 0, 0], wanted)
    magnitudes = torch.arange(257) / 256
    bits = np.floor(4 + 4 * magnitudes.double().numpy()).astype(int)
    assert set(bits) == {4, 5, 6, 7, 8}
    wanted = level // (256 >> bits[:, None]) * (256 >> bits[:, None])
    np.testing.assert_array_equal(alone(named("Posterize"), levels, magnitudes).numpy()[:, 0, 0], wanted)


def test_equalizing_spreads_levels_by_their_ranks() -> None:
    """Of a histogram h, level i becomes (step / 2 + sum of h below i) / step; step is 1/255 of all but the last bin."""
    images = pictures("narrow", 8, 3, 40, 40, 5)
    found = alone(named("Equalize"), images, 0.5).numpy()
    for before, after in zip(images.numpy().reshape(24, -1), found.reshape(24, -1), strict=True):
        counts = np.bincount(before, minlength=256)
        step = (len(before) - counts[before.max()]) // 255
        table = np.minimum((step // 2 + np.concatenate([[0], counts.cumsum()[:-1]])) // step, 255)
        np.testing.assert_array_equal(after, table[before])
    few = images[:, :, :15, :17]  # 255 pixels have no step
    assert torch.equal(alone(named("Equalize"), few, 0.5), few)
    enough = torch.full((1, 1, 16, 16), 100, dtype=torch.uint8)  # these have a step of 1
    enough[..., 7, 7] = 200
    spread = alone(named("Equalize"), enough, 0.5)
    assert spread.unique().tolist() == [0, 255] and spread[0, 0, 7, 7] == 255


@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_a_turned_sign_is_the_magnitude_on_the_other_side(name: str) -> None:
    images = pictures("noise", 9, 3, 17, 23, 6)
    magnitudes = torch.arange(9)[:, None] / 8
    centres = torch.zeros(9, 1, 2)
    turned, straight = (
        batched.every(images, (named(name),), lam, torch.full((9, 1), sign), centres)
        for lam, sign in ((magnitudes, True), (1 - magnitudes, False))
    )
    assert torch.equal(turned, straight)
    assert not torch.equal(turned, batched.every(images, (named(name),), magnitudes, torch.zeros(9, 1).bool(), centres))


def test_signs_matter_to_nothing_else() -> None:
    images = pictures("noise", 4, 3, 20, 20, 7)
    others = [operation for operation in OPERATIONS if not operation.signed]
    magnitudes, mirrored, centres = draws(4, len(others), 8)
    both = [batched.every(images, others, magnitudes, signs, centres) for signs in (mirrored, ~mirrored)]
    assert torch.equal(*both)


@pytest.mark.parametrize(
    "operation", [each for each in OPERATIONS if each.neutral is not None], ids=lambda each: each.name
)
def test_the_neutral_magnitude_leaves_an_image_alone(operation: Operation) -> None:
    images = pictures("noise", 4, 3, 19, 20, 9)
    assert torch.equal(alone(operation, images, operation.neutral), images)
    far = 0.0 if operation.neutral == 1 else 1.0
    assert not torch.equal(alone(operation, images, far), images)


def test_cutout_lays_one_square_at_its_centre() -> None:
    """lam 1 is a fifth of the width; the hole begins half of that before its centre, and has both its ends."""
    images = torch.full((3, 3, 30, 40), 7, dtype=torch.uint8)
    centres = torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.99, 0.99]])
    found = alone(named("Cutout"), images, 1.0, centres).numpy()
    for image, (top, bottom, left, right) in zip(
        found, [(11, 19, 16, 24), (0, 8, 0, 8), (25, 29, 35, 39)], strict=True
    ):
        wanted = np.full((3, 30, 40), 7)
        wanted[:, top : bottom + 1, left : right + 1] = np.array([125, 123, 114])[:, None, None]
        np.testing.assert_array_equal(image, wanted)


def test_grey_images_have_no_colour_to_change_and_a_hole_of_its_luma() -> None:
    images = pictures("noise", 4, 1, 20, 20, 10)
    assert torch.equal(alone(named("Color"), images, 0.0), images)
    cut = alone(named("Cutout"), torch.zeros_like(images), 1.0)
    assert cut.unique().tolist() == [0, round(0.299 * 125 + 0.587 * 123 + 0.114 * 114)]


def test_slots_follow_one_another_and_an_empty_one_does_nothing() -> None:
    images = pictures("noise", 6, 3, 16, 16, 11)
    solarize, contrast = NAMES.index("Solarize"), NAMES.index("Contrast")
    magnitudes, mirrored, centres = draws(6, 3, 12)
    magnitudes[:] = torch.tensor([0.4, 0.9, 0.9])
    orders = torch.tensor([[solarize, contrast, -1], [-1, solarize, contrast]]).repeat(3, 1)
    magnitudes[1::2] = torch.tensor([0.9, 0.4, 0.9])
    orders[4:] = torch.tensor([[contrast, -1, solarize], [-1, -1, -1]])
    found = batched.augmented(images, OPERATIONS, Chain(orders, magnitudes, mirrored, centres))
    one_by_one = alone(named("Contrast"), alone(named("Solarize"), images[:4], 0.4), 0.9)
    assert torch.equal(found[:4], one_by_one)
    assert not torch.equal(found[4], alone(named("Contrast"), alone(named("Solarize"), images[4:5], 0.4), 0.9)[0])
    assert torch.equal(found[5], images[5])


def test_what_an_image_becomes_depends_on_nothing_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on the other images of its batch, nor on their order, nor on how many are worked on at once."""
    images = pictures("noise", 40, 3, 12, 22, 13)
    places = torch.from_numpy(np.random.default_rng(14).integers(-1, len(OPERATIONS), (40, 3)))
    chain = Chain(places, *draws(40, 3, 15))
    found = batched.augmented(images, OPERATIONS, chain)
    order = torch.from_numpy(np.random.default_rng(16).permutation(40)[:23])
    shuffled = Chain(*(each[order] for each in (chain.operations, chain.magnitudes, chain.mirrored, chain.centres)))
    assert torch.equal(batched.augmented(images[order], OPERATIONS, shuffled), found[order])
    given = draws(40, len(OPERATIONS), 17)
    every = batched.every(images, OPERATIONS, *given)
    monkeypatch.setattr(placing, "_AT_ONCE", 2000)
    assert torch.equal(batched.augmented(images, OPERATIONS, chain), found)
    assert torch.equal(batched.every(images, OPERATIONS, *given), every)


@pytest.mark.parametrize("module", [batched, by_pillow])
def test_images_are_left_as_they_were_however_they_lie_in_memory(module: Any) -> None:
    images = pictures("noise", 8, 3, 18, 14, 18)
    before = images.clone()
    given = draws(8, len(OPERATIONS), 19)
    every = module.every(images, OPERATIONS, *given)
    places = torch.from_numpy(np.random.default_rng(20).integers(0, len(OPERATIONS), (8, 2)))
    chain = Chain(places, *(each[:, :2] for each in given))
    found = module.augmented(images, OPERATIONS, chain)
    assert torch.equal(images, before)
    for same in (
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([images, images], 3)[..., :14],
    ):
        assert torch.equal(module.every(same, OPERATIONS, *given), every)
        assert torch.equal(module.augmented(same, OPERATIONS, chain), found)
    assert torch.equal(images, before)


@pytest.mark.parametrize("module", [batched, by_pillow])
def test_no_images_are_no_images(module: Any) -> None:
    images = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    chain = Chain(torch.zeros(0, 2, dtype=torch.int64), *draws(0, 2, 0))
    assert module.augmented(images, OPERATIONS, chain).shape == (0, 3, 8, 8)
    assert module.every(images, OPERATIONS, *draws(0, 17, 0)).shape == (0, 17, 3, 8, 8)
    images, chain = (
        torch.ones(2, 1, 8, 8, dtype=torch.uint8),
        Chain(torch.zeros(2, 0, dtype=torch.int64), *draws(2, 0, 0)),
    )
    assert torch.equal(module.augmented(images, OPERATIONS, chain), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_all_that_is_computed_is_where_the_images_are(channels: int) -> None:
    """On a device that refuses operands of another, which has no numbers but all the rules: no GPU is needed."""
    images = torch.zeros(40, channels, 20, 30, dtype=torch.uint8, device="meta")
    places = torch.from_numpy(np.random.default_rng(21).integers(-1, len(OPERATIONS), (40, 2)))
    found = batched.augmented(images, OPERATIONS, Chain(places, *draws(40, 2, 22)))
    assert (found.device.type, found.dtype, found.shape) == ("meta", torch.uint8, images.shape)
    every = batched.every(images, OPERATIONS, *draws(40, 17, 23))
    assert (every.device.type, every.dtype, every.shape) == ("meta", torch.uint8, (40, 17, channels, 20, 30))
