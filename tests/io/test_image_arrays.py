"""Arrays of images: scikit-learn's digits, and npz by all its usual names."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from image_inputs import ARRAYS, LABELS, opened, pictures
from pomona.errors import DataError


def test_the_digits_are_scikit_learns_in_their_order_half_of_them_to_train_on() -> None:
    data = load_digits()
    for images in (opened(), opened("builtin:digits")):
        found = list(images)
        assert images.count == len(found) == 1797
        assert [item.id for item in found[:2]] == ["digit-0000", "digit-0001"] and found[-1].id == "digit-1796"
        assert [item.label for item in found] == data.target.tolist()
        train = np.random.default_rng(0).permutation(1797)[:898]
        assert {place for place, item in enumerate(found) if item.split == "train"} == set(train.tolist())
        assert all(item.split in ("train", "test") for item in found)
        stacked = np.stack([item.content for item in found])
        assert stacked.dtype == np.uint8 and np.abs(stacked * (16 / 255) - data.images).max() <= 0.5 * 16 / 255
        assert len(pickle.dumps(found[5])) < 1000


@pytest.mark.parametrize(
    "names",
    [("x_{}", "y_{}", ("train", "val", "test")), ("{}_images", "{}_labels", ("train", "validation", "test"))],
)
def test_arrays_of_several_splits_are_read_in_their_order(
    tmp_path: Path, names: tuple[str, str, tuple[str, ...]]
) -> None:
    images, labels, splits = names
    arrays = {}
    for place, split in enumerate(reversed(splits)):
        arrays[images.format(split)] = ARRAYS[place : place + 1]
        arrays[labels.format(split)] = np.array([[place]])  # as CIFAR-10 and MedMNIST have them
    np.savez(tmp_path / "a.npz", **arrays)
    found = pictures(tmp_path / "a.npz")
    assert [(item.split, item.label) for item in found] == [("train", 2), ("validation", 1), ("test", 0)]
    assert found[0].id == f"a.npz:{images.format('train')}[0]"
    np.testing.assert_array_equal(found[0].content, ARRAYS[2])


def test_whole_numbers_of_other_formats_and_truth_values_are_pixels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=ARRAYS[..., 0].astype(np.int64))
    assert [item.label for item in pictures(tmp_path / "a.npz")] == [None] * 6
    np.testing.assert_array_equal(pictures(tmp_path / "a.npz")[2].content, ARRAYS[2, ..., 0])
    np.savez(tmp_path / "b.npz", images=ARRAYS > 99, labels=np.array([b"a"] * 6))
    (first, *_) = pictures(tmp_path / "b.npz")
    assert first.label == "a"
    np.testing.assert_array_equal(first.content, (ARRAYS[0] > 99) * 255)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.array([{}], dtype=object)}, "x holds Python objects, a pickle, which is never loaded"),
        ({"x": ARRAYS, "y": np.array(LABELS, dtype=object)}, "y holds Python objects, a pickle"),
        ({"x": ARRAYS, "y": np.zeros(6, [("a", object)])}, "y is damaged: Object arrays cannot be loaded"),
        ({"x": ARRAYS / 255}, "x holds float64; images are uint8"),
        ({"x": ARRAYS.astype(int) * 2}, "x goes from 0 to 510; images are 0 to 255"),
        ({"x": ARRAYS.transpose(0, 3, 2, 1)}, r"x is \(6, 3, 4, 5\); images are"),
        ({"x": ARRAYS[0, 0]}, r"x is \(4, 3\); images are"),
        ({"x": ARRAYS[:, :0]}, r"x is \(6, 0, 4, 3\)"),
        ({"x": ARRAYS, "y": np.eye(6)}, r"y is \(6, 6\) for 6 images"),
        ({"x": ARRAYS, "y": np.arange(5)}, r"y is \(5,\) for 6 images"),
        ({"x": ARRAYS, "y": np.arange(6) + 0.5}, "y holds no label but 0.5"),
        ({"pictures": ARRAYS}, "no array of images, only pictures"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=said):
        pictures(tmp_path / "a.npz")


def test_an_array_asked_for_by_name_is_never_another(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=ARRAYS, y_train=np.arange(6), z=np.arange(6))
    for options, said in (
        ({"label_field": "fine"}, r'"fine" is missing \(use --label-field\); there are x_train'),
        ({"label_field": "z"}, '"z" belongs to no images'),
        ({"image_field": "pictures"}, r'"pictures" is missing \(use --image-field\)'),
    ):
        with pytest.raises(DataError, match=said):
            pictures(tmp_path / "a.npz", **options)
    found = pictures(tmp_path / "a.npz", image_field="x_train", label_field="z")
    assert [picture.label for picture in found] == [*range(6)]


def test_a_damaged_archive_is_bad_data(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=ARRAYS)
    whole = (tmp_path / "a.npz").read_bytes()
    wrong = bytearray(whole)
    wrong[len(whole) // 2] ^= 255
    for data in (b"", b"no archive", whole[: len(whole) // 2], bytes(wrong)):
        (tmp_path / "a.npz").write_bytes(data)
        with pytest.raises(DataError, match=r"a\.npz"):
            pictures(tmp_path / "a.npz")
