"""Which adapters are merged, by the tracks of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from methods.mera_merge.adapterhub import make_bottleneck, make_lora
from pomona.errors import DataError, MissingError, UsageError
from pomona.methods.mera_merge import adapters, tracks
from pomona.methods.mera_merge.adapters import Adapter

TRACKS = {"mnli": "NLI", "sst2": "sentiment", "qnli": "NLI"}


@pytest.fixture
def three(tmp_path: Path) -> list[Adapter]:
    made = [(label, make_bottleneck(tmp_path / label, seed=1, name=f"{label}-task")) for label in TRACKS]
    return [adapters.read(f"{label}={folder}", allow_pickle=False) for label, folder in made]


def test_json_and_toml_give_the_same_tracks(tmp_path: Path) -> None:
    (tmp_path / "tracks.json").write_text(json.dumps(TRACKS))
    (tmp_path / "tracks.toml").write_text('mnli = "NLI"\nsst2 = "sentiment"\n"qnli" = " NLI "\n')
    assert tracks.read(tmp_path / "tracks.json") == TRACKS
    assert tracks.read(tmp_path / "tracks.toml") == TRACKS


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    (
        ("a.json", b'{"mnli": "NLI"', "delimiter: line 1"),
        ("a.json", b'{"mnli": "NLI", "mnli": "QA"}', "mnli is named twice"),
        ("a.json", b'["mnli"]', "holds no object"),
        ("a.json", b'{"mnli": 3}', "track of mnli is no text"),
        ("a.json", b'{"mnli": " "}', "track of mnli is no text"),
        ("a.json", b"\xff\xfe", "not UTF-8"),
        ("a.json", b"[" * 100_000, "recursion"),
        ("a.json", b"", "Expecting value"),
        ("a.toml", b"mnli = NLI", "line 1"),
        ("a.toml", b'[mnli]\ntrack = "NLI"', "track of mnli is no text"),
    ),
)
def test_a_file_that_gives_no_tracks_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as raised:
        tracks.read(tmp_path / name)
    assert "\n" not in raised.value.message
    assert raised.value.message.startswith(str(tmp_path / name))


def test_a_file_that_is_not_there_is_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(MissingError, match="cannot be read"):
            tracks.read(path)


def test_a_track_leaves_the_others_out_and_says_so(three: list[Adapter]) -> None:
    found = tracks.choose(three, TRACKS, "NLI", "error")
    assert found.places == (0, 2)
    assert not found.crossed
    assert found.said == "track NLI: mnli, qnli; left out: sst2"
    assert tracks.choose(three, TRACKS, "sentiment", "error").places == (1,)


def test_a_track_that_no_adapter_is_of_is_a_mistake(three: list[Adapter]) -> None:
    with pytest.raises(UsageError, match="--track QA: no adapter is of it") as raised:
        tracks.choose(three, {**TRACKS, "squad": "QA"}, "QA", "warn")
    assert raised.value.hint == "there are NLI, sentiment"


@pytest.mark.parametrize("track", (None, "NLI"))
def test_an_adapter_without_a_track_is_refused(three: list[Adapter], track: str | None) -> None:
    with pytest.raises(DataError, match="no track for sst2, qnli"):
        tracks.choose(three, {"mnli": "NLI"}, track, "warn")


def test_several_tracks_are_merged_with_a_warning_or_not_at_all(three: list[Adapter]) -> None:
    found = tracks.choose(three, TRACKS, None, "warn")
    assert found.crossed
    assert found.places == (0, 1, 2)
    assert found.said == "adapters of 2 tracks are merged: NLI, sentiment"
    with pytest.raises(DataError, match="adapters of 2 tracks are merged: NLI, sentiment"):
        tracks.choose(three, TRACKS, None, "error")
    alike = tracks.choose(three, dict.fromkeys(TRACKS, "NLI"), None, "error")
    assert not alike.crossed
    assert alike.places == (0, 1, 2)


def test_without_tracks_all_are_merged_and_their_tasks_are_said(three: list[Adapter], tmp_path: Path) -> None:
    found = tracks.choose(three, None, None, "error")
    assert found.places == (0, 1, 2)
    assert not found.crossed
    assert found.said == (
        "none are given, and all 3 adapters are merged; they call their tasks mnli-task, sst2-task, qnli-task"
    )
    lora: dict[str, Any] = {"task_type": "SEQ_CLS"}
    typed = adapters.read(str(make_lora(tmp_path / "typed", seed=1, **lora)), allow_pickle=False)
    untyped = adapters.read(str(make_lora(tmp_path / "untyped", seed=1)), allow_pickle=False)
    assert [tracks.task(adapter) for adapter in (typed, untyped)] == ["SEQ_CLS", "untyped"]
