"""Texts out of any file that people keep them in, in order and none altered."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.errors import DataError, MissingError, UsageError
from pomona.models.texts import OWN, digest, own, read_texts


def _file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_plain_text_is_its_paragraphs_with_their_line_breaks(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.txt", "\n\nOne\ntwo.\n \t\n\n  Three.\n")
    assert read_texts(path, 9) == ["One\ntwo.", "  Three."]


def test_plain_text_without_blank_lines_is_its_lines(tmp_path: Path) -> None:
    assert read_texts(_file(tmp_path, "a.txt", "\nOne.\n Two. \nThree.\n\n"), 9) == ["One.", "Two.", "Three."]


def test_windows_line_ends_and_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.txt", b"\xef\xbb\xbfOne\r\ntwo.\r\n\r\nThree.\r\n")
    assert read_texts(path, 9) == ["One\ntwo.", "Three."]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
def test_records_give_their_field_text(tmp_path: Path, suffix: str) -> None:
    rows = [{"id": "1", "text": "One."}, {"id": "2", "text": " "}, {"id": "3", "text": "Thrée, ok."}]
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "csv":
        path.write_text('id,text\n1,One.\n2, \n3,"Thrée, ok."\n', "utf-8")
    else:
        lines = json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(lines.encode()) if suffix.endswith("gz") else lines.encode())
    assert read_texts(path, 9) == ["One.", "Thrée, ok."]


def test_records_without_the_field_give_their_only_text(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.jsonl", '{"label": 1, "sentence": "One."}\n{"sentence": "Two.", "note": "n"}\n')
    assert read_texts(path, 9) == ["One.", "Two."]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "One."}\n{"text": 2}\n', r"a\.jsonl:2: field 'text'"),
        ("a.jsonl", '{"text": "One."}\nnot json\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '{"a": "One.", "b": "Two."}\n', r"a\.jsonl:1: .*several texts \(a, b\)"),
        ("a.jsonl", '{"a": 1}\n', r"a\.jsonl:1: .*no text"),
        ("a.txt", b"One.\n\nTw\xff.\n", r"a\.txt:3: not UTF-8"),
        ("a.txt", b"One.\n\0\n", r"a\.txt:2: .*NUL"),
        ("a.txt", " \n\n", r"holds no text"),
        ("a.jsonl", "", r"holds no text"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_texts(_file(tmp_path, name, content), 9)


def test_files_that_are_absent_or_no_files_are_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.txt", tmp_path):
        for ask in (lambda path: read_texts(path, 1), digest):
            with pytest.raises(MissingError, match=str(path)):
                ask(path)


def test_only_the_first_are_read(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.txt", b"One.\n\nTwo.\n\n\xff")
    assert read_texts(path, 2) == ["One.", "Two."]
    with pytest.raises(UsageError):
        read_texts(path, 0)


def test_our_own_texts_come_in_turn_and_whole() -> None:
    texts = read_texts(None, 1000)
    assert texts[0] == "The ferry at Oldney" and texts[1].startswith("Reading tide gauges")
    assert read_texts(None, 7) == texts[:7]
    squeezed = ["".join(own(name).decode().split()) for name in OWN]
    assert sum(map(len, squeezed)) == sum(len("".join(text.split())) for text in texts)
    assert len(texts) > 60


def test_a_digest_names_the_bytes_read(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.txt", "One.")
    assert digest(path) == {"name": "a.txt", "bytes": 4, "sha256": hashlib.sha256(b"One.").hexdigest()}
    both = b"".join(own(name) for name in OWN)
    assert digest(None)["sha256"] == hashlib.sha256(both).hexdigest() and digest(None)["bytes"] == len(both)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abc é漢.", min_size=1, max_size=20).filter(str.strip), min_size=2, max_size=8))
def test_paragraphs_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = _file(tmp_path_factory.mktemp("texts"), "a.txt", "\n\n".join(texts))
    assert [text.strip() for text in read_texts(path, 99)] == [text.strip() for text in texts]
