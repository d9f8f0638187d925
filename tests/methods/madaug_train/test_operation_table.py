"""The table of operations: ranges of the released code, effective strengths, and names people type."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from pomona.errors import UnavailableError, UsageError
from pomona.methods.madaug_train.operations import batched, by_pillow, choice
from pomona.methods.madaug_train.operations.choice import backend
from pomona.methods.madaug_train.operations.table import GREY_HOLE, HOLE, OPERATIONS, chosen, strength

CPU = torch.device("cpu")


def test_there_are_the_17_operations_of_the_released_code_with_its_ranges() -> None:
    ranges = {operation.name: (operation.low, operation.high) for operation in OPERATIONS}
    assert ranges == {
        **dict.fromkeys(("ShearX", "ShearY"), (-0.3, 0.3)),
        **dict.fromkeys(("TranslateX", "TranslateY"), (-0.45, 0.45)),
        "Rotate": (-30, 30),
        "Solarize": (0, 256),
        "Posterize": (4, 8),
        **dict.fromkeys(("Contrast", "Color", "Brightness", "Sharpness"), (0.1, 1.9)),
        "Cutout": (0, 0.2),
        **dict.fromkeys(("AutoContrast", "Invert", "Equalize", "Flip", "Identity"), (0, 1)),
    }
    assert len(OPERATIONS) == 17
    assert [each.name for each in OPERATIONS if each.signed] == [
        "ShearX",
        "ShearY",
        "TranslateX",
        "TranslateY",
        "Rotate",
    ]


def test_the_grey_hole_is_the_luma_of_the_coloured_one() -> None:
    red, green, blue = HOLE
    assert round(0.299 * red + 0.587 * green + 0.114 * blue) == GREY_HOLE


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"), [1, 0.5, 0, 0.5, 1]),
        (("Contrast", "Color", "Brightness", "Sharpness"), [1, 0.5, 0, 0.5, 1]),
        (("Solarize", "Posterize"), [1, 0.75, 0.5, 0.25, 0]),
        (("Cutout",), [0, 0.25, 0.5, 0.75, 1]),
        (("AutoContrast", "Invert", "Equalize", "Flip"), [1, 1, 1, 1, 1]),
        (("Identity",), [0, 0, 0, 0, 0]),
    ],
)
def test_strength_is_how_far_from_doing_nothing_a_magnitude_is(names: tuple[str, ...], wanted: list[float]) -> None:
    operations = [operation for operation in OPERATIONS if operation.name in names]
    assert len(operations) == len(names)
    magnitudes = np.repeat(np.linspace(0, 1, 5)[:, None], len(names), 1)
    np.testing.assert_allclose(strength(operations, magnitudes), np.repeat(np.array(wanted)[:, None], len(names), 1))


def test_strength_keeps_the_shape_of_what_it_is_given() -> None:
    magnitudes = np.random.default_rng(0).random((3, 4, 17))
    found = strength(OPERATIONS, magnitudes)
    assert found.shape == (3, 4, 17)
    np.testing.assert_allclose(found[1, 2], strength(OPERATIONS, magnitudes[1, 2]))


def test_operations_are_chosen_by_name_in_any_case_and_come_in_one_order() -> None:
    assert chosen("all") == chosen(" ALL ") == OPERATIONS
    assert [each.name for each in chosen("invert, translatex,INVERT")] == ["TranslateX", "Invert"]


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("Translate,Invert", "'Translate' is no operation", "TranslateX"),
        ("invert,zoom", "'zoom' is no operation", "Identity"),
        ("Invert,", "'' is no operation", "Rotate"),
        ("", "'' is no operation", "Rotate"),
        ("Invert,invert", "nothing to choose", "two operations"),
        ("all,Invert", "'all' is no operation", "Rotate"),
    ],
)
def test_names_that_are_none_are_refused_with_near_ones(text: str, said: str, hint: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        chosen(text)
    assert hint in (caught.value.hint or "")


def test_auto_is_decided_by_the_device_and_the_size_alone() -> None:
    assert backend("auto", CPU, 1, 32, 32) is backend("auto", CPU, 3, 512, 512) is batched
    assert backend("auto", CPU, 1, 128, 128) is batched
    assert backend("auto", CPU, 1, 224, 224) is by_pillow
    assert backend("auto", torch.device("cuda"), 1, 1024, 1024) is batched
    assert backend("auto", torch.device("mps"), 3, 32, 32) is by_pillow
    assert backend("batched", CPU, 1, 1024, 1024) is batched
    assert backend("pillow", torch.device("cuda"), 3, 8, 8) is by_pillow
    with pytest.raises(UnavailableError, match="double precision"):
        backend("batched", torch.device("mps"), 3, 8, 8)


def test_without_pillow_only_pillow_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    for name in [name for name in sys.modules if name == "PIL" or name.startswith("PIL.")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert backend("auto", CPU, 1, 1024, 1024) is batched
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    draws = torch.rand(2, 17), torch.rand(2, 17) < 0.5, torch.rand(2, 17, 2)
    assert batched.every(images, OPERATIONS, *draws).shape == (2, 17, 3, 8, 8)
    with pytest.raises(UnavailableError) as caught:
        backend("pillow", CPU, 3, 8, 8)
    assert caught.value.hint == "pip install 'pomona[vision]'"
