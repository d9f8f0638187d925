"""Finished work is found again after any end of the process, and only by a run it belongs to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pomona.errors import MissingError, UsageError
from pomona.io.journal import Journal

PRINT = {"command": "x", "model": "m", "template": "alpaca"}


def test_what_was_appended_is_there_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, PRINT, resume=False)
    for number in range(100):
        journal.append(f"k{number}", {"n": number, "text": "ü\n" * number})
    assert journal.get("k7") == {"n": 7, "text": "ü\n" * 7}
    again = Journal(path, PRINT, resume=True)  # the first was never closed
    assert len(again) == 100
    assert again.get("k99") == {"n": 99, "text": "ü\n" * 99}
    assert again.get("absent") is None


def test_a_torn_last_line_is_dropped_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, PRINT, resume=False)
    journal.append("a", {"n": 1})
    whole = path.read_bytes()
    journal.append("b", {"n": 2})
    full = path.read_bytes()
    for length in range(len(full)):
        path.write_bytes(full[:length])
        again = Journal(path, PRINT, resume=True)
        assert (again.get("a") is not None) == (length >= len(whole))
        assert again.get("b") is None
        again.append("c", {"n": 3})
        again.close()
        assert Journal(path, PRINT, resume=True).get("c") == {"n": 3}
        assert all(json.loads(line) for line in path.read_text().splitlines())


def test_integers_beyond_64_bits_keep_their_value(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", PRINT, resume=False)
    journal.append_all({"a": {"n": 2**70 + 1}, "b": {"n": -(2**63)}})
    assert journal.get("a") == {"n": 2**70 + 1}
    journal.close()
    again = Journal(tmp_path / "j", PRINT, resume=True)
    assert again.keys() == ["a", "b"] and again.get("a") == {"n": 2**70 + 1} and again.get("b") == {"n": -(2**63)}


def test_another_fingerprint_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path, PRINT, resume=False).close()
    with pytest.raises(UsageError, match="template = 'alpaca', now it is 'plain'"):
        Journal(path, {**PRINT, "template": "plain"}, resume=True)


def test_without_resume_it_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path, PRINT, resume=False).append("a", {"n": 1})
    assert len(Journal(path, {**PRINT, "model": "other"}, resume=False)) == 0


@pytest.mark.parametrize("content", [b"hello\n", b"[]\n", b'{"a": 1}\n'])
def test_a_file_that_is_no_journal_is_not_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "j"
    path.write_bytes(content)
    with pytest.raises(MissingError, match="not a line of a journal"):
        Journal(path, PRINT, resume=True)
    assert path.read_bytes() == content


def test_closing_can_remove_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", PRINT, resume=False)
    journal.close(remove=True)
    assert not (tmp_path / "j").exists()


def test_a_line_that_no_journal_wrote_is_named_and_not_met_later(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path, PRINT, resume=False).close()
    head = path.read_bytes()
    foreign = [
        b'{"key":5,"value":{}}',
        b'{"key":{},"value":{}}',
        b'{"key":"a"}',
        b'{"key":"a","value":[1]}',
        b"[]",
        b"3",
    ]
    for content in [*(head + line for line in foreign), b'{"fingerprint":[]}', b'{"fingerprint":"x"}', b"null"]:
        path.write_bytes(content + b"\n")
        with pytest.raises(MissingError, match="not a line of a journal"):
            Journal(path, PRINT, resume=True)


def test_an_entry_that_is_absent_is_one_that_is_null(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path, {"command": "x", "old": None, "inner": {"a": 1}}, resume=False).close()
    Journal(path, {"command": "x", "inner": {"a": 1, "new": None}}, resume=True).close()
    with pytest.raises(UsageError, match=r"was made with inner.a = 1, now it is 2"):
        Journal(path, {"command": "x", "inner": {"a": 2}}, resume=True)
