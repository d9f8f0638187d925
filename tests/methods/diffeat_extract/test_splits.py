"""Splits: the data's own where there is one, classes in proportion, draws balanced, nested and apart from tests."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pomona.errors import DataError
from pomona.methods.diffeat_extract.probing.splits import draws, task, validation

LABELS = ["cat"] * 40 + ["dog"] * 20 + ["eel"] * 7


def _counts(labels: np.ndarray, places: np.ndarray) -> dict[int, int]:
    return dict(Counter(labels[places].tolist()))


def test_images_without_a_split_are_parted_class_by_class() -> None:
    found = task(LABELS, [None] * 67, test_share=0.25, seed=0)
    assert found.names == ["cat", "dog", "eel"]
    assert _counts(found.labels, found.test) == {0: 10, 1: 5, 2: 2}
    assert sorted([*found.train, *found.test]) == list(range(67))
    assert np.all(np.diff(found.train) > 0) and np.all(np.diff(found.test) > 0)


def test_a_split_depends_on_the_seed_alone() -> None:
    first, again, other = (task(LABELS, [None] * 67, test_share=0.5, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.test, again.test) and not np.array_equal(first.test, other.test)
    runs = np.array([task(LABELS, [None] * 67, test_share=0.5, seed=seed).test for seed in range(300)])
    chosen = np.bincount(runs.ravel(), minlength=67)[:60] / 300  # every image as often as any other
    assert abs(chosen.mean() - 0.5) < 1e-9 and np.abs(chosen - 0.5).max() < 0.15


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_every_class_is_learned_from_and_tested_on_whatever_the_share(share: float) -> None:
    found = task(["a"] * 2 + ["b"] * 30, [None] * 32, test_share=share, seed=0)
    assert _counts(found.labels, found.test)[0] == 1 and _counts(found.labels, found.train)[0] == 1


def test_the_datas_own_split_is_kept_and_validation_joins_training() -> None:
    splits = ["train", "test", "validation", "test", "train", "test"]
    found = task([1, 1, 0, 0, 0, 1], splits, test_share=0.9, seed=3)
    assert found.train.tolist() == [0, 2, 4] and found.test.tolist() == [1, 3, 5]


def test_validation_is_tested_on_where_the_data_have_no_test() -> None:
    found = task([1, 1, 0, 0], ["train", "validation"] * 2, test_share=0.5, seed=0)
    assert found.train.tolist() == [0, 2] and found.test.tolist() == [1, 3]


@pytest.mark.parametrize("only", ["train", "test"])
def test_data_of_one_part_are_parted_anew(only: str) -> None:
    found = task(LABELS, [only] * 67, test_share=0.5, seed=0)
    plain = task(LABELS, [None] * 67, test_share=0.5, seed=0)
    assert np.array_equal(found.test, plain.test)


def test_labels_that_are_whole_numbers_are_in_their_order() -> None:
    assert task([10, 9, "9", 10, 2, "2"], [None] * 6, test_share=0.5, seed=0).names == ["2", "9", "10"]
    assert task(["b", "10", "9"] * 2, [None] * 6, test_share=0.5, seed=0).names == ["10", "9", "b"]


def test_labels_of_one_value_stand_in_one_order_however_they_were_met() -> None:
    """A set gives its members in an order that changes from process to process."""
    written = [f"{'0' * zeros}7" for zeros in range(12)]
    assert task([*written, *written], [None] * 24, test_share=0.5, seed=0).names == sorted(written)


@pytest.mark.parametrize(
    ("labels", "splits", "said"),
    [
        ([None, None], [None] * 2, "have no labels"),
        (["a", None, "b"], [None] * 3, "image 1 has no label"),
        (["a", "a"], [None] * 2, 'all images are labelled "a"'),
        (["a", "a", "b"], [None] * 3, 'label "b" has one image'),
        (["a", "a", "b", "b"], ["train", "test", None, "test"], "image 2 belongs to no split"),
        (["a", "a", "b", "b"], ["train", "test", "test", "test"], 'label "b" is among the test images and not'),
        ([], [], "there are no images"),
    ],
)
def test_what_cannot_be_probed_is_refused(labels: list[str | None], splits: list[str | None], said: str) -> None:
    with pytest.raises(DataError, match=said):
        task(labels, splits, test_share=0.5, seed=0)


# --- draws -----------------------------------------------------------------------------------------------------------


def test_draws_are_balanced_without_replacement_and_never_of_test_images() -> None:
    found = task(LABELS, [None] * 67, test_share=0.5, seed=0)
    drawn = draws(found, 3, 5, seed=0)
    assert len(drawn) == 5 and len({tuple(rows) for rows in drawn}) == 5
    for rows in drawn:
        assert len(set(rows)) == 9 and np.all(np.diff(rows) > 0)
        assert _counts(found.labels, rows) == {0: 3, 1: 3, 2: 3}
        assert not set(rows) & set(found.test) and set(rows) <= set(found.train)


def test_a_draw_stays_the_same_among_more_draws_and_within_one_of_more_shots() -> None:
    found = task(LABELS, [None] * 67, test_share=0.5, seed=0)
    few, many = draws(found, 1, 2, seed=4), draws(found, 3, 6, seed=4)
    assert np.array_equal(draws(found, 1, 6, seed=4)[1], few[1])
    assert all(set(small) <= set(large) for small, large in zip(few, many, strict=False))
    assert not np.array_equal(draws(found, 3, 1, seed=5)[0], many[0])


def test_all_of_the_images_are_one_draw() -> None:
    found = task(LABELS, [None] * 67, test_share=0.5, seed=0)
    assert [rows.tolist() for rows in draws(found, None, 5, seed=0)] == [found.train.tolist()]


def test_a_class_with_too_few_images_is_named() -> None:
    found = task(LABELS, [None] * 67, test_share=0.5, seed=0)
    with pytest.raises(DataError, match=r'label "eel" has 3 images to learn from, fewer than 4') as caught:
        draws(found, 4, 1, seed=0)
    assert caught.value.hint == "--shots 3 at most, or all"


# --- choosing --------------------------------------------------------------------------------------------------------


def test_settings_are_chosen_inside_the_part_to_learn_from() -> None:
    found = task(LABELS, [None] * 67, test_share=0.5, seed=0)
    inner = validation(found, seed=0)
    assert sorted([*inner.train, *inner.test]) == found.train.tolist()
    assert not set(inner.test) & set(found.test)
    assert _counts(found.labels, inner.train) == {0: 10, 1: 5, 2: 1} and inner.names == found.names
    assert not np.array_equal(validation(found, seed=1).test, inner.test)


def test_a_class_of_one_image_to_learn_from_cannot_be_chosen_by() -> None:
    found = task(["a", "a", "b", "b", "b"], ["train", "test", "train", "train", "test"], test_share=0.5, seed=0)
    with pytest.raises(DataError, match='label "a" has one image to learn from'):
        validation(found, seed=0)
