"""The books of a stream, and what its manifest may not hold."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from pomona.errors import OutputError
from pomona.io.manifest import plain
from pomona.io.stream import Spool, Stream, StreamOptions
from pomona.runtime.progress import Quiet
from pomona.runtime.settings import Settings


def stream(path: Path, settings: Settings, **options: Any) -> Stream:
    return Stream(
        "test",
        (str(path),),
        StreamOptions(**options),
        settings,
        stdout=io.BytesIO(),
        progress=Quiet(),
        own_key="own",
        described={"base_url": "http://user:secret@host/v1"},
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(10)))
    return path


def test_every_record_is_written_filtered_or_rejected(data: Path, tmp_path: Path) -> None:
    with stream(data, Settings(output=tmp_path / "out.jsonl"), rejects=tmp_path / "bad.jsonl") as run:
        for located in run.records():
            n = located.record["n"]
            if n % 3 == 0:
                run.emit(located.record)
            elif n % 3 == 1:
                run.filter("one")
            else:
                run.reject(located, "two")
    assert run.counts.summary() == {
        "in": 10,
        "out": 4,
        "filtered": 3,
        "rejected": 3,
        "filtered_by": {"one": 3},
        "rejected_by": {"two": 3},
    }
    assert [json.loads(line)["record"]["n"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == [2, 5, 8]


def test_an_exception_publishes_nothing(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), stream(data, Settings(output=tmp_path / "out.jsonl")) as run:
        for located in run.records():
            run.emit(located.record)
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_incomplete_run_publishes_nothing_and_keeps_the_journal(data: Path, tmp_path: Path) -> None:
    with stream(data, Settings(output=tmp_path / "out.jsonl")) as run:
        run.open_journal({"a": 1})
        run.journal.append("k", {"v": 1})
        run.incomplete("budget")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl.journal"]
    with pytest.raises(OutputError, match="earlier run"), stream(data, Settings(output=tmp_path / "out.jsonl")):
        pass


def test_the_manifest_holds_no_password(data: Path, tmp_path: Path) -> None:
    with stream(data, Settings(output=tmp_path / "out.jsonl")) as run:
        list(run.records())
    text = (tmp_path / "out.jsonl.manifest.json").read_text()
    assert "secret" not in text and "http://host/v1" in text
    assert plain({"a": ("x@y.org", "https://t:p@h")}) == {"a": ["x@y.org", "https://h"]}


def test_a_spool_gives_back_what_it_took_in_any_order() -> None:
    spool = Spool()
    records = [{"n": n, "text": "ü" * n, "big": 2**70 + n} for n in range(50)]
    assert [spool.append(record) for record in records] == list(range(50))
    assert spool[49] == records[49] and spool[0] == records[0]
    assert list(spool) == records
    with pytest.raises(IndexError):
        spool[50]
