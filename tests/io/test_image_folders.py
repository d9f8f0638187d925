"""Folders of images: classes, splits, links and odd names."""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path

import pytest

from image_inputs import ARRAYS, opened, pictures, png, put, reasons
from pomona.errors import DataError
from pomona.io.images import Picture
from pomona.io.pixels import pixels


def test_folders_in_a_folder_are_classes(tmp_path: Path) -> None:
    put(tmp_path, "b/2.png", "b/10.JPG", "a/deep/1.webp", "a/0.png", "b/.hidden.png", ".git/x.png")
    (tmp_path / "a/notes.txt").write_text("no image")
    images = opened(tmp_path)
    found = [(item.id, item.label, item.split) for item in images if isinstance(item, Picture)]
    assert found == [
        ("a/0.png", "a", None),
        ("a/deep/1.webp", "a", None),
        ("b/10.JPG", "b", None),
        ("b/2.png", "b", None),
    ]
    assert (images.count, images.skipped) == (4, 2)
    assert list(images) == list(images)


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("train", "test", "test"),
        ("training", "val", "validation"),
        ("Train", "valid", "validation"),
        ("train2017", "val2017", "validation"),
        ("train", "dev", "validation"),
    ],
)
def test_folders_called_train_and_test_are_splits(tmp_path: Path, train: str, other: str, split: str) -> None:
    put(tmp_path, f"{train}/ape/1.png", f"{other}/ape/1.png", f"{other}/bee/2.png")
    found = sorted((item.id, item.label, item.split) for item in pictures(tmp_path))
    assert found == sorted(
        [
            (f"{train}/ape/1.png", "ape", "train"),
            (f"{other}/ape/1.png", "ape", split),
            (f"{other}/bee/2.png", "bee", split),
        ]
    )


def test_a_class_that_is_called_train_is_a_class_among_others(tmp_path: Path) -> None:
    put(tmp_path, "bus/1.png", "train/1.png")
    assert [(item.label, item.split) for item in pictures(tmp_path)] == [("bus", None), ("train", None)]


def test_a_flat_folder_has_no_labels_and_splits_may_be_flat(tmp_path: Path) -> None:
    put(tmp_path / "flat", "1.png", "2.png")
    assert [(item.id, item.label) for item in pictures(tmp_path / "flat")] == [("1.png", None), ("2.png", None)]
    put(tmp_path / "halves", "train/1.png", "test/1.png")
    assert [(item.label, item.split) for item in pictures(tmp_path / "halves")] == [(None, "test"), (None, "train")]


def test_an_image_beside_class_folders_is_rejected(tmp_path: Path) -> None:
    put(tmp_path, "ape/1.png", "stray.png")
    assert reasons(tmp_path) == ["1: it has no label, and others have"]


def test_a_file_that_is_an_image_is_an_input(tmp_path: Path) -> None:
    put(tmp_path, "one.png", "two.png")
    assert [item.id for item in pictures(tmp_path / "two.png", tmp_path / "one.png")] == ["two.png", "one.png"]


def test_links_are_followed_but_never_round_or_twice(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "1.png")
    put(tmp_path / "data", "ape/1.png", "ape/2.png")
    (tmp_path / "data/bee").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/ape/3.png").symlink_to(tmp_path / "data/ape/1.png")
    assert [item.id for item in pictures(tmp_path / "data")] == ["ape/1.png", "ape/2.png", "ape/3.png", "bee/1.png"]
    (tmp_path / "data/ape/up").symlink_to(tmp_path / "data")
    with pytest.raises(DataError, match=r"ape/up is .*data again, by a link"):
        opened(tmp_path / "data")
    (tmp_path / "data/ape/up").unlink()
    (tmp_path / "data/cow").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"cow is .*bee again, by a link"):
        opened(tmp_path / "data")


def test_what_cannot_be_read_is_an_image_all_the_same_and_counts_in_the_digest(tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    (before,) = opened(tmp_path).sources
    os.mkfifo(tmp_path / "2.png")
    (tmp_path / "3.png").symlink_to("3.png")
    (tmp_path / "4.png").symlink_to("/proc/self/mem")
    (tmp_path / "5.png").symlink_to("nowhere")
    assert [item.id for item in pictures(tmp_path)] == [f"{n}.png" for n in range(1, 6)]
    (entry,) = opened(tmp_path).sources
    assert entry["files"] == 5 and entry["bytes"] == before["bytes"] and entry["sha256"] != before["sha256"]


def test_a_folder_may_be_deeper_than_python_recurses(tmp_path: Path) -> None:
    put(tmp_path, "/".join("d" * 400) + "/1.png")
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(inspect.stack()) + 150)
        assert [item.label for item in pictures(tmp_path)] == ["d"]
    finally:
        sys.setrecursionlimit(limit)


def test_odd_names_are_kept_apart(tmp_path: Path) -> None:
    names = ["new\nline.png", "space .png", "«été»/雨 🍏.png", "quote'\".png", "-dash.png"]
    put(tmp_path, *(name if "/" in name else f"x/{name}" for name in names))
    for raw in (b"\xff\xfe.png", b"\xff\xfd.png"):
        (tmp_path / "x" / os.fsdecode(raw)).write_bytes(png(ARRAYS[0]))
    found = pictures(tmp_path)
    assert len({item.id for item in found}) == 7
    for item in found:
        json.dumps([item.id, item.source, item.label], ensure_ascii=False).encode()
        assert pixels(item.content, channels=3, size=None).shape == (5, 4, 3)
    assert "x/\\xff\\xfd.png" in {item.id for item in found}


def test_a_folder_without_images_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="no images") as raised:
        opened(tmp_path)
    assert "1 other files" in str(raised.value.hint)
