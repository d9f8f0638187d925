"""Inputs of images: the same pictures from every layout, with labels, names and splits; faults by their place."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from image_inputs import ARRAYS, LABELS, lines, opened, pictures, png, put, reasons
from pomona.errors import DataError, MissingError, UsageError
from pomona.io import images as module
from pomona.io.images import Picture
from pomona.io.pixels import pixels
from pomona.io.records import Reject

# --- every layout ----------------------------------------------------------------------------------------------------


def layouts(folder: Path) -> Iterator[tuple[str, Path]]:
    """The six images with their labels, in every layout that has room for both."""
    put(folder, *(f"{label}/{place}.png" for place, label in enumerate(LABELS)))
    yield "folder", folder
    named = [{"image": f"{label}/{place}.png", "label": label} for place, label in enumerate(LABELS)]
    yield "jsonl", lines(folder / "a.jsonl", named)
    (folder / "a.json").write_text(json.dumps(named))
    yield "json", folder / "a.json"
    pd.DataFrame(named).to_csv(folder / "a.csv", index=False)
    yield "csv", folder / "a.csv"
    pd.DataFrame(named).to_parquet(folder / "paths.parquet")
    yield "paths in Parquet", folder / "paths.parquet"
    held = [{"image": png(array), "label": label} for array, label in zip(ARRAYS, LABELS, strict=True)]
    pd.DataFrame(held).to_parquet(folder / "bytes.parquet")
    yield "bytes in Parquet", folder / "bytes.parquet"
    structs = [{"image": {"bytes": row["image"], "path": "same.png"}, "label": row["label"]} for row in held]
    pd.DataFrame(structs).to_parquet(folder / "structs.parquet")
    yield "structs in Parquet", folder / "structs.parquet"
    addresses = [
        {"image": f"data:image/png;base64,{base64.b64encode(row['image']).decode()}", "label": row["label"]}
        for row in held
    ]
    yield "data addresses", lines(folder / "data.jsonl", addresses)
    absolute = [{"image": str(folder / row["image"]), "label": row["label"]} for row in named]
    yield "absolute paths", lines(folder / "absolute.jsonl", absolute)
    np.savez_compressed(folder / "a.npz", images=ARRAYS, labels=np.array(LABELS))
    yield "npz", folder / "a.npz"


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return dict(layouts(tmp_path_factory.mktemp("layouts")))


def test_every_layout_gives_the_same_pixels_and_labels(everywhere: dict[str, Path]) -> None:
    for kind, path in everywhere.items():
        images = opened(path)
        found = [item for item in images if isinstance(item, Picture)]
        assert [item.label for item in found] == LABELS, kind
        stacked = np.stack([pixels(item.content, channels=3, size=None) for item in found])
        np.testing.assert_array_equal(stacked, ARRAYS, kind)
        assert images.count == 6, kind
        assert all(pickle.loads(pickle.dumps(item)).id == item.id for item in found), kind


def test_names_are_paths_in_the_input_or_places_in_the_source(everywhere: dict[str, Path]) -> None:
    second = {kind: pictures(path)[1].id for kind, path in everywhere.items()}
    absolute = str(everywhere["folder"] / "ape/1.png")
    assert second == {
        "folder": "ape/1.png",
        "jsonl": "ape/1.png",
        "json": "ape/1.png",
        "csv": "ape/1.png",
        "paths in Parquet": "ape/1.png",
        "bytes in Parquet": "bytes.parquet:2",
        "structs in Parquet": "structs.parquet:2",
        "data addresses": "data.jsonl:2",
        "absolute paths": absolute,
        "npz": "a.npz:images[1]",
    }


def test_a_pipe_is_read_as_a_file_is_with_paths_of_the_working_directory(
    everywhere: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = everywhere["jsonl"].read_bytes()
    monkeypatch.chdir(everywhere["folder"])
    kept = os.dup(0)
    reading, writing = os.pipe()
    try:
        os.write(writing, data)
        os.close(writing)
        os.dup2(reading, 0)
        images = opened("-")
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(reading)
    for _ in range(2):
        found = [item for item in images if isinstance(item, Picture)]
        assert [item.label for item in found] == LABELS
        assert (found[3].source, found[3].line) == ("standard input", 4)
    assert images.sources[0] == {
        "name": "standard input",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    with pytest.raises(UsageError, match="twice"):
        opened("-", "-")


def test_a_named_pipe_can_be_gone_through_again(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "2.png")
    os.mkfifo(tmp_path / "pipe")
    data = b'{"image": "1.png"}\n{"image": "2.png"}\n'
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    images = opened(tmp_path / "pipe")
    writer.join()
    assert [item.id for item in images] == [item.id for item in images] == ["1.png", "2.png"]


def test_saved_datasets_keep_their_splits_and_the_names_of_classes(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["ape", "bee"]), "page": Value("int32")})
    rows = [{"image": {"bytes": png(array), "path": None}, "label": n % 2, "page": n} for n, array in enumerate(ARRAYS)]
    rows[5]["label"] = -1  # how `datasets` says that there is none
    train = Dataset.from_list(rows[:4], features=features)
    DatasetDict(train=train, test=Dataset.from_list(rows[4:], features=features)).save_to_disk(str(tmp_path / "two"))
    images = opened(tmp_path / "two")
    found = list(images)
    assert [(item.label, item.split, item.fields) for item in found if isinstance(item, Picture)] == [
        ("ape", "train", {"page": 0}),
        ("bee", "train", {"page": 1}),
        ("ape", "train", {"page": 2}),
        ("bee", "train", {"page": 3}),
        ("ape", "test", {"page": 4}),
    ]
    assert isinstance(found[5], Reject) and found[5].line == 2
    assert isinstance(found[0], Picture) and found[0].id == "two/train:1"
    np.testing.assert_array_equal(pixels(found[0].content, channels=3, size=None), ARRAYS[0])
    assert images.count == 6
    train.select([2, 0]).save_to_disk(str(tmp_path / "one"))
    assert [(item.id, item.split, item.fields["page"]) for item in pictures(tmp_path / "one")] == [
        ("one:1", None, 2),
        ("one:2", None, 0),
    ]


def test_the_hub_is_streamed_and_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"image": {"bytes": png(array), "path": None}, "label": 1} for array in ARRAYS]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ape", "bee"])})
    asked = []

    def load(name: str, split: str, streaming: bool) -> Any:
        asked.append((name, split, streaming))
        return datasets.Dataset.from_list(rows, features=features).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    images = opened("hf:some/animals:test")
    found = [item for item in images if isinstance(item, Picture)]
    assert asked == [("some/animals", "test", True)]
    assert [(item.id, item.label, item.split) for item in found[:1]] == [("hf:some/animals:test:1", "bee", "test")]
    np.testing.assert_array_equal(pixels(found[5].content, channels=3, size=None), ARRAYS[5])
    before = images.sources
    rows[2]["label"] = 0
    assert opened("hf:some/animals:test").sources != before
    assert pictures("hf:some/animals")[0].split is None


# --- records ---------------------------------------------------------------------------------------------------------


def test_records_keep_every_other_field_in_order_without_the_bytes(tmp_path: Path) -> None:
    record = {"z": [1, {"b": None}], "image": "1.png", "id": 7, "split": "val", "é": "ü", "label": True, "a": 2.5}
    put(tmp_path, "1.png")
    (found,) = pictures(lines(tmp_path / "a.jsonl", [record]))
    assert (found.id, found.label, found.split) == ("7", "true", "validation")
    assert list(found.fields.items()) == [("z", [1, {"b": None}]), ("é", "ü"), ("a", 2.5)]
    table = pa.table(
        {
            "image": [png(ARRAYS[0])],
            "thumbnail": [b"\xff\xd8"],
            "day": pa.array([0], pa.date32()),
            "mean": [float("nan")],
            "nested": [{"mask": b"\0", "n": 3}],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    (found,) = pictures(tmp_path / "a.parquet")
    assert found.fields == {"day": "1970-01-01", "mean": None, "nested": {"n": 3}}


def test_fields_go_by_the_names_that_the_options_give(tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    path = lines(tmp_path / "a.jsonl", [{"img": "1.png", "fine_label": 3.0, "key": "k", "label": "x"}])
    (found,) = pictures(path, image_field="img", label_field="fine_label", id_field="key")
    assert (found.id, found.label, found.fields) == ("k", 3, {"label": "x"})
    for option, said in [
        ("image_field", "--image-field"),
        ("label_field", "--label-field"),
        ("id_field", "--id-field"),
    ]:
        (reason,) = reasons(path, **{"image_field": "img", option: "none"})
        assert 'field "none" is missing' in reason and said in reason and "img, fine_label, key" in reason


def test_a_split_of_another_name_stays_a_field(tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    (found,) = pictures(lines(tmp_path / "a.jsonl", [{"image": "1.png", "split": "unlabelled"}]))
    assert (found.split, found.fields) == (None, {"split": "unlabelled"})


def test_a_record_that_says_nothing_usable_is_rejected_with_its_line(tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    path = lines(
        tmp_path / "a.jsonl",
        [
            {"image": "1.png", "label": "x"},
            {"image": None, "label": "x"},
            {"image": "", "label": "x"},
            {"image": [[0, 1]], "label": "x"},
            {"image": "https://example.com/1.png", "label": "x"},
            {"image": "data:image/png;base64,@@@", "label": "x"},
            {"image": "1.png", "label": ["x"], "id": "a"},
            {"image": "1.png", "label": 1.5, "id": "b"},
            {"image": "1.png", "label": None, "id": "c"},
            {"image": "1.png", "id": "d"},
            {"image": "1.png", "label": "x", "id": {"a": 1}},
            {"picture": "1.png"},
            {"image": {"bytes": None, "path": None}, "label": "x"},
        ],
    )
    path.write_text(path.read_text() + "no JSON\n")
    assert [reason.partition(" but ")[0].partition(" JSON: ")[0] for reason in reasons(path)] == [
        '2: field "image" holds no image',
        '3: field "image" holds no image',
        '4: field "image" holds no image',
        '5: field "image" holds the address https://example.com/1.png; nothing is fetched, give files',
        '6: field "image": damaged base64: Only base64 data is allowed',
        '7: field "label" holds no label',
        '8: field "label" holds no label',
        "9: it has no label, and others have",
        "10: it has no label, and others have",
        '11: field "id" holds no name',
        '12: field "image" is missing (use --image-field); there are picture',
        '13: field "image" holds no image',
        "14: not",
    ]


def test_nulls_in_parquet_are_images_and_labels_that_are_not_there(tmp_path: Path) -> None:
    data = png(ARRAYS[0])
    table = pa.table(
        {"image": [data, None, data, data], "label": pa.array([1, 2, None, 3]), "id": ["a", "b", "c", None]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    found = list(opened(tmp_path / "a.parquet"))
    assert [item.reason if isinstance(item, Reject) else (item.id, item.label) for item in found] == [
        ("a", 1),
        'field "image" holds no image but null',
        "it has no label, and others have",
        ("a.parquet:4", 3),
    ]


def test_a_table_without_any_label_has_none(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "2.png")
    assert [item.label for item in pictures(lines(tmp_path / "a.jsonl", [{"image": "1.png"}, {"image": "2.png"}]))] == [
        None,
        None,
    ]


# --- what decides the result -----------------------------------------------------------------------------------------


def test_the_digest_of_a_folder_is_over_paths_sizes_and_contents_wherever_it_lies(tmp_path: Path) -> None:
    put(tmp_path / "data", "b/1.png", "a/1.png")
    (entry,) = opened(tmp_path / "data").sources
    expected = hashlib.sha256()
    for name in ("a/1.png", "b/1.png"):
        data = (tmp_path / "data" / name).read_bytes()
        expected.update(f"{name}\0{len(data)}\0{hashlib.sha256(data).hexdigest()}\n".encode())
    size = sum(path.stat().st_size for path in (tmp_path / "data").rglob("*.png"))
    assert entry == {"name": "data", "files": 2, "bytes": size, "sha256": expected.hexdigest()}
    shutil.copytree(tmp_path / "data", tmp_path / "moved/data")
    (tmp_path / "moved/data/notes.txt").write_text("no image")
    assert opened(tmp_path / "moved/data").sources == [entry]
    (tmp_path / "moved/data/a/1.png").write_bytes(png(ARRAYS[4]))
    assert opened(tmp_path / "moved/data").sources != [entry]
    shutil.copy(tmp_path / "data/a/1.png", tmp_path / "moved/data/a/1.png")
    assert opened(tmp_path / "moved/data").sources == [entry]
    (tmp_path / "moved/data/a/1.png").rename(tmp_path / "moved/data/a/2.png")
    assert opened(tmp_path / "moved/data").sources != [entry]


def test_the_digest_of_a_table_counts_the_images_that_it_names(everywhere: dict[str, Path], tmp_path: Path) -> None:
    table = everywhere["bytes in Parquet"].read_bytes()
    assert opened(everywhere["bytes in Parquet"]).sources == [
        {"name": "bytes.parquet", "bytes": len(table), "sha256": hashlib.sha256(table).hexdigest()}
    ]
    put(tmp_path, "1.png", "2.png")
    path = lines(tmp_path / "a.jsonl", [{"image": "1.png"}, {"image": "absent.png"}])
    before = opened(path).sources
    assert [entry["name"] for entry in before] == ["a.jsonl", "images that a.jsonl names"]
    assert before[1]["files"] == 2 and before[1]["bytes"] == (tmp_path / "1.png").stat().st_size
    shutil.copy(tmp_path / "2.png", tmp_path / "1.png")
    after = opened(path).sources
    assert after[0] == before[0] and after[1] != before[1]


def test_a_limit_counts_over_all_inputs_and_bounds_what_is_read(tmp_path: Path) -> None:
    put(tmp_path / "one", "1.png", "2.png")
    put(tmp_path / "two", "3.png", "4.png", "5.png")
    images = opened(tmp_path / "one", tmp_path / "two", limit=3)
    assert images.count == 3
    assert [item.id for item in images if isinstance(item, Picture)] == ["1.png", "2.png", "3.png"]
    assert [entry["files"] for entry in images.sources] == [2, 1]
    assert len(list(opened(limit=5))) == opened(limit=5).count == 5


def test_two_images_of_one_name_are_refused_by_both_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "1.png", "2.png")
    path = lines(tmp_path / "a.jsonl", [{"image": "1.png"}, {"image": "2.png"}, {"image": "1.png"}])
    with pytest.raises(DataError, match=r'a\.jsonl:3: the name "1\.png" is also that of .*a\.jsonl:1') as raised:
        list(opened(path))
    assert "--id-field" in str(raised.value.hint)
    put(tmp_path / "again", "1.png")
    with pytest.raises(DataError, match=r"again/1\.png:1: .*1\.png"):
        list(opened(tmp_path / "1.png", tmp_path / "again"))
    monkeypatch.setattr(module, "_key", lambda name: 5)  # names that are not alike, whatever their digests
    assert len(pictures(tmp_path / "again", tmp_path / "2.png")) == 2


def test_inputs_that_are_not_there_are_missing(tmp_path: Path) -> None:
    (tmp_path / "animals.parquet").write_bytes(b"")
    with pytest.raises(MissingError, match="no such file or folder") as raised:
        opened(tmp_path / "animal.parquet")
    assert "animals.parquet" in str(raised.value.hint)
    with pytest.raises(MissingError, match="there is only builtin:digits"):
        opened("builtin:mnist")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/dataset_dict.json").write_text("{}")
    with pytest.raises(MissingError, match="not a readable dataset"):
        opened(tmp_path / "saved")
    with pytest.raises(DataError, match="there are no images"):
        list(opened(lines(tmp_path / "empty.jsonl", [])))


def test_labels_of_several_inputs_are_all_text_where_one_is(tmp_path: Path) -> None:
    put(tmp_path / "folder", "0/a.png", "1/b.png")
    np.savez(tmp_path / "a.npz", images=ARRAYS, labels=np.arange(6))
    assert [picture.label for picture in pictures(tmp_path / "a.npz")] == [*range(6)]
    found = pictures(tmp_path / "a.npz", tmp_path / "folder")
    assert [picture.label for picture in found] == ["0", "1", "2", "3", "4", "5", "0", "1"]
