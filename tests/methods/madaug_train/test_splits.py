"""Parts: the data's own where it has them, classes in proportion otherwise; never the same pixels in two of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.errors import DataError
from pomona.methods.madaug_train.config import SplitOptions
from pomona.methods.madaug_train.splits import Drawn, Listed, drawn, moments, overlap


def listed(labels: Any, splits: Any = None, contents: Any = None) -> Listed:
    """Images named by their places; by default of one part, and no two alike."""
    numbers = np.array(labels, dtype=np.int64)
    return Listed(
        labels=numbers,
        names=[f"class {number}" for number in range(numbers.max() + 1)],
        ids=[f"image {place}" for place in range(len(numbers))],
        splits=list(splits or ["train"] * len(numbers)),
        contents=np.arange(len(numbers)) if contents is None else np.array(contents),
    )


def cut(images: Listed, seed: int = 0, **options: Any) -> Drawn:
    return drawn(images, SplitOptions(**options), seed=seed)


def counts(images: Listed, places: np.ndarray) -> list[int]:
    return [Counter(images.labels[places].tolist())[place] for place in range(len(images.names))]


UNEVEN = listed([0] * 100 + [1] * 50 + [2] * 10)


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_shares_are_of_each_class_and_validation_is_of_what_is_left_to_learn_from() -> None:
    found = cut(UNEVEN, test_fraction=0.2, val_fraction=0.25)
    assert counts(UNEVEN, found.test) == [20, 10, 2]
    assert counts(UNEVEN, found.val) == [20, 10, 2]
    assert counts(UNEVEN, found.train) == [60, 30, 6] and (found.unused, found.dropped) == (0, 0)
    for part in (found.train, found.val, found.test):
        assert np.all(np.diff(part) > 0)


def test_numbers_are_of_all_images_and_classes_keep_their_proportions() -> None:
    found = cut(UNEVEN, train_images=32, val_images=17)
    assert counts(UNEVEN, found.train) == [20, 10, 2]
    assert counts(UNEVEN, found.val) == [11, 5, 1]  # 10.625, 5.3125, 1.0625: the one left goes to the largest remainder
    assert counts(UNEVEN, found.test) == [69, 35, 7] and found.unused == 0  # no part is there, and both are numbers


def test_images_beyond_a_number_are_unused_where_the_test_images_are_a_share() -> None:
    found = cut(UNEVEN, train_images=32)
    assert (len(found.test), len(found.val), len(found.train)) == (32, 26, 32)
    assert found.unused == 160 - 32 - 26 - 32


def test_every_image_is_drawn_as_often_as_any_other_and_seeds_draw_apart() -> None:
    images = listed([0] * 30 + [1] * 30)
    often = np.zeros(60)
    for seed in range(300):
        often[cut(images, seed, test_fraction=0.5).test] += 1 / 300
    assert often.mean() == pytest.approx(0.5) and np.abs(often - 0.5).max() < 0.13  # 4.5 standard deviations
    first, again, other = (cut(images, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.train, again.train) and not np.array_equal(first.train, other.train)


def test_test_images_do_not_depend_on_how_the_others_are_parted() -> None:
    parted = [cut(UNEVEN, val_fraction=share).test for share in (0.2, 0.5)] + [cut(UNEVEN, val_images=50).test]
    assert all(np.array_equal(parted[0], each) for each in parted)


# --- the data's own parts --------------------------------------------------------------------------------------------

OWN = listed([0, 1] * 30, ["train"] * 40 + ["validation"] * 12 + ["test"] * 8)


def test_own_parts_are_kept_under_every_seed() -> None:
    for seed in range(3):
        found = cut(OWN, seed)
        assert [len(found.train), len(found.val), len(found.test)] == [40, 12, 8]
        assert found.val.tolist() == list(range(40, 52)) and found.test.tolist() == list(range(52, 60))


def test_what_is_missing_is_drawn_from_the_images_to_learn_from() -> None:
    without_val = listed([0, 1] * 30, ["train"] * 40 + ["test"] * 20)
    found = cut(without_val, val_fraction=0.25)
    assert counts(without_val, found.val) == [5, 5] and found.val.max() < 40 <= found.test.min()
    without_test = listed([0, 1] * 30, ["train"] * 40 + ["validation"] * 20)
    found = cut(without_test, test_fraction=0.25)
    assert counts(without_test, found.test) == [5, 5] and found.test.max() < 40 <= found.val.min()
    assert len(cut(without_test, train_images=10, val_images=10).test) == 8  # a share, as there is a part


def test_numbers_are_drawn_from_own_parts_too() -> None:
    found = cut(OWN, train_images=10, val_images=6)
    assert counts(OWN, found.train) == [5, 5] and counts(OWN, found.val) == [3, 3]
    assert found.val.min() >= 40 and (len(found.test), found.unused) == (8, 36)


def test_parts_are_drawn_independently_of_one_another() -> None:
    images = listed([0] * 90, ["train"] * 40 + ["validation"] * 40 + ["test"] * 10)
    images.labels[::2] = 1
    images.names.append("class 1")
    found = cut(images, train_images=20, val_images=20)
    assert not np.array_equal(found.train, found.val - 40)


def test_images_for_nothing_are_counted_and_in_no_part() -> None:
    images = listed([0, 1] * 20, ["train"] * 20 + ["test"] * 10 + [None] * 10)
    found = cut(images)
    assert found.unused == 10 and max(found.train.max(), found.val.max(), found.test.max()) < 30


# --- the same pixels -------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_image_is_accounted_for_and_no_pixels_are_in_two_parts(data: st.DataObject) -> None:
    size = data.draw(st.integers(24, 60))
    labels = [*([0] * 6 + [1] * 6), *data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))]
    groups = data.draw(st.lists(st.integers(0, 2 * size), min_size=size, max_size=size))
    contents = list(range(12))
    for place, group in enumerate(groups, 12):
        contents.append(groups.index(group) + 12 if groups.index(group) + 12 < place else place)
    splits = ["train"] * 12 + data.draw(
        st.sampled_from(
            [
                ["train"] * size,
                data.draw(st.lists(st.sampled_from(["train", "test", None]), min_size=size, max_size=size)),
            ]
        )
    )
    images = listed(labels, splits, contents)
    options = {
        "train_images": data.draw(st.sampled_from([None, 4])),
        "val_images": data.draw(st.sampled_from([None, 4])),
    }
    try:
        found = cut(images, data.draw(st.integers(0, 9)), overlap="drop", **options)
    except DataError:
        return
    used = [*found.train, *found.val, *found.test]
    assert len(used) == len(set(used)) == len(labels) - found.unused - found.dropped
    assert found.unused >= splits.count(None) and found.dropped >= 0
    held = [set(images.contents[part].tolist()) for part in (found.train, found.val, found.test)]
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])
    assert all(min(counts(images, part)) > 0 for part in (found.train, found.val))


def test_copies_are_drawn_together_and_numbers_are_met_all_the_same() -> None:
    contents = [place - place % 4 if place < 20 else place for place in range(60)]
    images = listed([0] * 60 + [1] * 60, contents=[*contents, *range(60, 120)])
    for seed in range(20):
        found = cut(images, seed, train_images=50, val_images=20)
        assert (len(found.train), len(found.val), len(found.test)) == (50, 20, 50)
        for part in (found.train, found.val, found.test):
            assert all(list(images.contents[part]).count(four) in (0, 4) for four in (0, 4, 8, 12, 16))


SHARED = listed(
    [0, 1] * 12,
    ["train"] * 16 + ["validation"] * 4 + ["test"] * 4,
    # 18 (validation) is 1 (train); 20 (test) is 2 and 3 (train); 23 (test) is 19 (validation)
    [0, 1, 2, 2, *range(4, 18), 1, 19, 2, 21, 22, 19],
)


def test_shared_pixels_are_refused_with_numbers_names_and_a_way_out() -> None:
    with pytest.raises(DataError) as caught:
        cut(SHARED)
    assert caught.value.exit_code == 4 and caught.value.hint == "--overlap drop leaves them out of what is learned from"
    assert caught.value.message == (
        '2 train images are test images too ("image 2" and "image 20"), 1 train image is a validation image too '
        '("image 1" and "image 18"), 1 validation image is a test image too ("image 19" and "image 23"), pixel by pixel'
    )


def test_shared_pixels_are_dropped_from_what_is_learned_from_never_from_the_test() -> None:
    found = cut(SHARED, overlap="drop")
    assert found.train.tolist() == [0, *range(4, 16)]
    assert found.val.tolist() == [16, 17, 18] and found.test.tolist() == [20, 21, 22, 23]
    assert (found.dropped, found.unused) == (4, 0)


def test_copies_within_a_part_are_nobodys_business() -> None:
    own, dropped = overlap(listed([0, 1] * 4, ["train"] * 4 + ["test"] * 4, [0, 0, 2, 3, 4, 4, 4, 7]), "refuse")
    assert dropped == 0 and own["train"].tolist() == [0, 1, 2, 3]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "options", "said", "hint"),
    [
        (listed([0] * 9), {}, 'all images are labelled "class 0"', None),
        (listed([0] * 9 + [1]), {}, 'label "class 1" has 1 image to learn from', "3 are the least"),
        (
            listed([0] * 8 + [1] * 2, ["train"] * 9 + ["test"]),
            {"val_fraction": 0.5},
            'label "class 1" has 1 image to learn from',
            "2 are the least",
        ),
        (
            listed([0] * 30 + [1] * 3),
            {"test_fraction": 0.1},
            'label "class 1" has 3 images, and --test-fraction 0.1 gives it none to test on',
            "try --test-fraction 0.167",
        ),
        (
            listed([0] * 30 + [1] * 4),
            {"test_fraction": 0.7},
            'label "class 1" has 4 images, and --test-fraction 0.7 leaves it 1 for the other parts',
            "try --test-fraction 0.624",
        ),
        (
            listed([0] * 30 + [1] * 3, ["train"] * 32 + ["test"]),
            {"val_fraction": 0.2},
            'label "class 1" has 2 images, and --val-fraction 0.2 gives it none to learn the policy on',
            "try --val-fraction 0.25",
        ),
        (
            listed([0] * 30 + [1] * 4),
            {"val_fraction": 0.9},
            'label "class 1" has 3 images, and --val-fraction 0.9 leaves it none for the other parts',
            "try --val-fraction 0.833",
        ),
        (
            listed([0] * 90 + [1] * 10),
            {"val_images": 4},
            'label "class 1" has 8 images, and --val-images 4 gives it none to learn the policy on',
            "try --val-images 10",
        ),
        (
            listed([0, 1] * 20, ["train"] * 30 + ["test"] * 10),
            {"val_images": 30},
            'label "class 0" has 15 images, and --val-images 30 leaves it none to learn from',
            "try --val-images 28",
        ),
        (listed([0, 1] * 20), {"val_images": 33}, "--val-images 33: there are 32 images", "give fewer"),
        (listed([0, 1] * 20), {"train_images": 27}, "--train-images 27: there are 26 images", "give fewer"),
        (
            listed([0, 1] * 20),
            {"train_images": 20, "val_images": 20},
            'label "class 0" has 10 images, and there are none left to test on',
            "a smaller --train-images",
        ),
        (
            listed([0, 0, 1, 1, 2, 2], ["train"] * 4 + ["test"] * 2),
            {},
            'image 4: label "class 2" is among the images that the network is tested on, and not among those to learn',
            None,
        ),
        (listed([0, 1, 0, 1], ["validation"] * 2 + ["test"] * 2), {}, "no images to learn from", "--resplit"),
        (
            listed([0] * 20 + [1] * 3, contents=[*range(20), 20, 20, 20]),
            {},
            'label "class 1" has 1 image, not counting copies, to learn from',
            "3 are the least",
        ),
    ],
)
def test_images_that_cannot_be_parted_are_refused(
    images: Listed, options: dict[str, Any], said: str, hint: str | None
) -> None:
    with pytest.raises(DataError) as caught:
        cut(images, **options)
    assert said in caught.value.message
    assert (hint in str(caught.value.hint)) if hint is not None else True


@pytest.mark.parametrize("few", [2, 3, 4, 5, 7, 9, 48])
@pytest.mark.parametrize(("option", "other"), [("val_fraction", "test"), ("test_fraction", "validation")])
@pytest.mark.parametrize("value", [0.0001, 0.01, 0.99])
def test_the_share_that_a_refusal_names_is_one_that_works(few: int, option: str, other: str, value: float) -> None:
    images = listed([0] * 400 + [1] * few + [0], ["train"] * (400 + few) + [other])
    with pytest.raises(DataError) as caught:
        cut(images, **{option: value})
    given = str(caught.value.hint).split()
    assert given[:2] == ["try", f"--{option.replace('_', '-')}"]
    cut(images, **{option: float(given[2])})


@pytest.mark.parametrize("few", [2, 3, 7])
@pytest.mark.parametrize("number", [3, 400])
def test_the_number_that_a_refusal_names_is_one_that_works(few: int, number: int) -> None:
    images = listed([0] * 400 + [1] * few + [0], ["train"] * (400 + few) + ["test"])
    with pytest.raises(DataError) as caught:
        cut(images, val_images=number + few * (number == 400))
    assert str(caught.value.hint).startswith("try --val-images ")
    cut(images, val_images=int(str(caught.value.hint).split()[-1]))


# --- normalisation ---------------------------------------------------------------------------------------------------


def test_mean_and_deviation_are_of_the_pixels_of_each_channel_at_the_places() -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 5, 4), dtype=np.uint8)
    images[:, 1] //= 9
    places = np.array([1, 5, 6, 39])
    mean, std = moments(images, places)
    pixels = images[places].astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), rtol=1e-13)


def test_a_channel_that_is_the_same_everywhere_has_deviation_one() -> None:
    images = np.full((6, 1, 8, 8), 200, dtype=np.uint8)
    assert moments(images, np.arange(6)) == ((200 / 255,), (1.0,))


def test_moments_do_not_depend_on_how_many_are_summed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(1).integers(0, 256, (50, 3, 6, 6), dtype=np.uint8)
    whole = moments(images, np.arange(50))
    monkeypatch.setattr("pomona.methods.madaug_train.splits._CHUNK", 700)
    assert moments(images, np.arange(50)) == whole
