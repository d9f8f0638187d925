"""Unreadable images: where they may be set aside, and what is kept of each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pomona.errors import DataError, OutputError, UsageError
from pomona.io.picture import Picture
from pomona.io.records import Reject
from pomona.io.rejects import none_readable, refuse_place, reject, unreadable, write_rejects
from pomona.runtime.settings import Settings

PICTURE = Picture("a/1.png", "a", None, {}, "data/a/1.png", 1, np.zeros((2, 2), dtype=np.uint8))


def test_an_image_is_kept_by_name_and_place_and_a_record_by_place() -> None:
    assert reject(PICTURE, "cut off") == {"reason": "cut off", "source": "data/a/1.png", "line": 1, "id": "a/1.png"}
    assert reject(Reject("no image", "a.jsonl", 7), "no image") == {
        "reason": "no image",
        "source": "a.jsonl",
        "line": 7,
    }


def test_without_a_place_the_first_stops_the_run_and_says_how_to_go_on() -> None:
    for entry, said in (
        (reject(PICTURE, "cut off"), "a/1.png: cut off"),
        ({"reason": "no image", "source": "a.jsonl", "line": 7}, "a.jsonl:7: no image"),
    ):
        error = unreadable(entry)
        assert isinstance(error, DataError) and error.message == said and "--rejects FILE" in str(error.hint)


def test_rejects_are_lines_of_json_and_written_where_none_could_be_read(tmp_path: Path) -> None:
    entries = [reject(PICTURE, "cut\noff"), {"reason": "é", "source": "b", "line": 2}]
    write_rejects(None, entries)
    error = none_readable(tmp_path / "bad.jsonl", entries)
    assert [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text("utf-8").splitlines()] == entries
    assert error.message == "no image could be read; of the first: cut\noff"


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    there = tmp_path / "bad.jsonl"
    there.write_text("")
    refuse_place(None, Settings())
    refuse_place(there, Settings(dry_run=True))
    refuse_place(there, Settings(overwrite=True))
    refuse_place(there, Settings(resume=True))
    for place, said in (
        (there, "exists"),
        (tmp_path, "it is a directory"),
        (tmp_path / "no" / "bad.jsonl", "the folder does not exist"),
    ):
        with pytest.raises(OutputError, match=said):
            refuse_place(place, Settings())
    with pytest.raises(UsageError, match="this is the output"):
        refuse_place(tmp_path / "x", Settings(output=tmp_path / "x"))
