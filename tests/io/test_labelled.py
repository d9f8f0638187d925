"""Labelled texts: the same from every layout, labels in one order, faults by line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pomona.errors import DataError, MissingError
from pomona.io.labelled import Labelled, read_labelled

RECORDS = [
    {"premise": "It rains.", "hypothesis": "It is wet.", "label": "yes"},
    {"premise": "Il pleut, « fort ».", "hypothesis": "", "label": "no"},
    {"premise": "雨", "hypothesis": "Dry.", "label": "maybe"},
    {"premise": "It rains.", "hypothesis": "Dry.", "label": "no"},
]


def written(folder: Path, suffix: str, records: list[dict[str, Any]] = RECORDS) -> Path:
    path = folder / f"data.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    elif suffix == "json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif suffix == "csv":
        pd.DataFrame(records).to_csv(path, index=False)
    else:
        pd.DataFrame(records).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_layout_gives_the_same_texts_and_labels(tmp_path: Path, suffix: str) -> None:
    found = read_labelled(written(tmp_path, suffix), text_fields=["premise", "hypothesis"], label_field="label")
    assert found == Labelled(
        texts=[(record["premise"], record["hypothesis"]) for record in RECORDS],
        labels=[2, 1, 0, 1],
        names=["maybe", "no", "yes"],
    )


def test_labels_that_are_whole_numbers_are_in_the_order_of_their_values_however_written(tmp_path: Path) -> None:
    records = [{"text": "a", "label": value} for value in (10, "9", -1, 9, 2.0)]
    found = read_labelled(written(tmp_path, "jsonl", records), text_fields=["text"], label_field="label")
    assert found.names == ["-1", "2", "9", "10"]
    assert found.labels == [3, 2, 0, 2, 1]


def test_truth_values_are_labels_of_their_own(tmp_path: Path) -> None:
    records = [{"text": "a", "label": value} for value in (True, False, "true")]
    found = read_labelled(written(tmp_path, "jsonl", records), text_fields=["text"], label_field="label")
    assert (found.names, found.labels) == (["false", "true"], [1, 0, 1])


def test_a_second_file_keeps_the_order_of_labels_of_the_first(tmp_path: Path) -> None:
    path = written(tmp_path, "jsonl")
    found = read_labelled(path, text_fields=["premise"], label_field="label", names=["yes", "no", "maybe", "never"])
    assert found.labels == [0, 1, 2, 1]
    assert found.names == ["yes", "no", "maybe", "never"]
    with pytest.raises(DataError, match=r'data\.jsonl:3: label "maybe" is not among') as caught:
        read_labelled(path, text_fields=["premise"], label_field="label", names=["yes", "no"])
    assert caught.value.hint == "they are yes, no"


def test_only_as_many_as_asked_for_are_read_and_what_follows_is_not_judged(tmp_path: Path) -> None:
    path = written(tmp_path, "jsonl")
    path.write_text(path.read_text(encoding="utf-8") + "{broken\n", encoding="utf-8")
    found = read_labelled(path, text_fields=["premise"], label_field="label", limit=2)
    assert (len(found.texts), found.names) == (2, ["no", "yes"])
    with pytest.raises(DataError, match=r"data\.jsonl:5: not JSON"):
        read_labelled(path, text_fields=["premise"], label_field="label")


def test_without_a_label_field_there_are_texts_alone(tmp_path: Path) -> None:
    found = read_labelled(written(tmp_path, "jsonl"), text_fields=["premise"], label_field=None)
    assert (len(found.texts), found.labels, found.names) == (4, [], [])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"label": 1}, r'data\.jsonl:2: field "text" is missing \(use --text-field\)'),
        ({"text": "a"}, r'data\.jsonl:2: field "label" is missing \(use --label-field\)'),
        ({"text": ["a"], "label": 1}, r'data\.jsonl:2: field "text" holds no text but a list'),
        ({"text": None, "label": 1}, r'data\.jsonl:2: field "text" holds no text but null'),
        ({"text": " \n", "label": 1}, r"data\.jsonl:2: the text is blank"),
        ({"text": "a", "label": None}, r'data\.jsonl:2: field "label" holds no label but None'),
        ({"text": "a", "label": ""}, r'data\.jsonl:2: field "label" holds no label but \'\''),
        ({"text": "a", "label": 0.5}, r'data\.jsonl:2: field "label" holds no label but 0\.5'),
        ({"text": "a", "label": {"x": 1}}, r'data\.jsonl:2: field "label" holds no label but'),
    ],
)
def test_a_bad_record_is_named_by_its_line_and_field(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = written(tmp_path, "jsonl", [{"text": "a", "label": 1}, record])
    with pytest.raises(DataError, match=message):
        read_labelled(path, text_fields=["text"], label_field="label")


def test_no_records_and_no_file_are_faults(tmp_path: Path) -> None:
    empty = tmp_path / "data.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match="there are no records"):
        read_labelled(empty, text_fields=["text"], label_field=None)
    with pytest.raises(MissingError, match="no such file"):
        read_labelled(tmp_path / "absent.jsonl", text_fields=["text"], label_field=None)
