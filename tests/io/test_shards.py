"""Shards are what was kept, or count as not there; nothing that is not finite is kept."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from faults.storage import room
from pomona.errors import CheckFailed, MissingError, OutputError
from pomona.io.journal import Journal, NoJournal
from pomona.io.shards import Column, Dtype, Shards, discard

COLUMNS = [Column("t50_u0r0_p2", 12, {"timestep": 50}), Column("t50_mid_p1", 5, {"timestep": 50})]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Shards]]:
    """Shards in the folder of the test, as a run opens them."""
    with contextlib.ExitStack() as journals:

        def open_shards(*, resume: bool = False, dtype: Dtype = "float32") -> Shards:
            journal = Journal(tmp_path / "out.journal", {"a": 1}, resume=resume)
            journals.callback(journal.close)
            return Shards(tmp_path / "out.shards", journal, COLUMNS, dtype)

        yield open_shards


def piece(index: int, rows: int = 4) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]], list[dict[str, Any]]]:
    """Rows, vectors and rejects of a shard."""
    rng = np.random.default_rng(index)
    names = [{"id": f"s{index}-{n}", "label": n % 3, "kept": {"huge": 2**70 + 1, "text": "ü\n"}} for n in range(rows)]
    vectors = {column.name: rng.standard_normal((rows, column.dims)).astype(np.float32) for column in COLUMNS}
    return names, vectors, [{"reason": "cut off", "line": index}] if index % 2 else []


def same(found: Mapping[str, NDArray[Any]], wanted: Mapping[str, NDArray[Any]]) -> bool:
    return list(found) == list(wanted) and all(
        found[name].dtype == wanted[name].dtype and np.array_equal(found[name], wanted[name]) for name in wanted
    )


def test_shards_come_back_in_the_order_of_their_indices_whatever_the_order_of_writing(
    opened: Any, tmp_path: Path
) -> None:
    shards = opened()
    for index in (3, 0, 11, 2):
        shards.write(index, *piece(index))
    for found in (shards, opened(resume=True)):
        assert [rows for rows, _ in found] == list(found.rows()) == [piece(index)[0] for index in (0, 2, 3, 11)]
        assert all(same(vectors, piece(index)[1]) for (_, vectors), index in zip(found, (0, 2, 3, 11), strict=True))
        assert list(found.rejects()) == [{"reason": "cut off", "line": 3}, {"reason": "cut off", "line": 11}]
        assert [found.has(index) for index in range(5)] == [True, False, True, True, False]


def test_a_column_is_read_alone(opened: Any, tmp_path: Path) -> None:
    shards = opened()
    for index in range(3):
        shards.write(index, *piece(index, rows=index))
    for column in COLUMNS:
        wanted = np.concatenate([piece(index, rows=index)[1][column.name] for index in range(3)])
        assert np.array_equal(shards.column(column.name), wanted)


def test_a_shard_is_a_safetensors_file_that_others_read(opened: Any, tmp_path: Path) -> None:
    shards = opened(dtype="float16")
    shards.write(7, *piece(7))
    wanted = {name: values.astype(np.float16) for name, values in piece(7)[1].items()}
    path = tmp_path / "out.shards/00000007.safetensors"
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # so that a mapped tensor is aligned
    found = load_file(path)
    assert same({name: found[name] for name in wanted}, wanted)
    (_, vectors), *_ = shards
    assert same(vectors, wanted)


def test_a_shard_without_rows_keeps_its_rejects(opened: Any, tmp_path: Path) -> None:
    shards = opened()
    shards.write(1, [], {}, [{"reason": "not an image"}])
    assert shards.has(1) and list(shards.rejects()) == [{"reason": "not an image"}]
    ((rows, vectors),) = shards
    assert rows == [] and {name: values.shape for name, values in vectors.items()} == {
        "t50_u0r0_p2": (0, 12),
        "t50_mid_p1": (0, 5),
    }


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, _cut, _flip])
def test_a_damaged_shard_counts_as_not_there_until_it_is_written_again(
    opened: Any, tmp_path: Path, damage: Any
) -> None:
    shards = opened()
    for index in range(2):
        shards.write(index, *piece(index))
    damage(tmp_path / "out.shards/00000001.safetensors")
    again = opened(resume=True)
    assert again.has(0) and not again.has(1)
    with pytest.raises(MissingError, match="00000001"):
        list(again)
    again.write(1, *piece(1))
    assert again.has(1) and [rows for rows, _ in again] == [piece(0)[0], piece(1)[0]]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused_by_row_and_column(opened: Any, tmp_path: Path, wrong: float) -> None:
    rows, vectors, rejects = piece(0)
    vectors["t50_mid_p1"][2, 4] = wrong
    with pytest.raises(CheckFailed, match="row s0-2: column t50_mid_p1 holds numbers that are not finite"):
        opened().write(0, rows, vectors, rejects)
    assert not (tmp_path / "out.shards").exists()


def test_a_number_beyond_half_precision_is_refused_and_named(opened: Any, tmp_path: Path) -> None:
    rows, vectors, rejects = piece(0)
    vectors["t50_u0r0_p2"][1, 0] = 65504  # the largest there is
    shards = opened(dtype="float16")
    shards.write(0, rows, vectors, rejects)
    vectors["t50_u0r0_p2"][1, 0] = -70000
    with pytest.raises(CheckFailed, match="row s0-1: column t50_u0r0_p2: -70000 is beyond float16") as caught:
        shards.write(1, rows, vectors, rejects)
    assert caught.value.hint == "--save-dtype float32" and not shards.has(1)


def test_rows_and_vectors_of_different_numbers_are_never_kept(opened: Any, tmp_path: Path) -> None:
    rows, vectors, rejects = piece(0)
    with pytest.raises(ValueError, match="t50_u0r0_p2"):
        opened().write(0, rows[:3], vectors, rejects)


def test_a_full_disk_keeps_the_shards_there_are(opened: Any, tmp_path: Path) -> None:
    shards = opened()
    shards.write(0, *piece(0))
    with room(400), pytest.raises(OutputError, match=r"00000001\.safetensors: the file would exceed") as caught:
        shards.write(1, *piece(1))
    assert caught.value.exit_code == 6
    assert [path.name for path in (tmp_path / "out.shards").iterdir()] == ["00000000.safetensors"]
    shards.write(1, *piece(1))
    assert shards.has(0) and shards.has(1)


def test_a_run_killed_while_it_writes_has_whole_shards_only(tmp_path: Path) -> None:
    """Shards of 4 MB, so that the kill falls into the writing of one."""
    script = """
        import sys
        from pathlib import Path
        import numpy as np
        from pomona.io.journal import Journal
        from pomona.io.shards import Column, Shards
        journal = Journal(Path("out.journal"), {}, resume=True)
        shards = Shards(Path("out.shards"), journal, [Column("a", 1024, {})], "float32")
        for index in range(1000):
            shards.write(index, [{"id": n} for n in range(1024)], {"a": np.full((1024, 1024), index, "float32")}, [])
            print(index, flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, stdout=subprocess.PIPE, env=dict(os.environ)
    )
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    told = 3 + len(process.stdout.read().splitlines())
    process.wait()
    journal = Journal(tmp_path / "out.journal", {}, resume=True)
    shards = Shards(tmp_path / "out.shards", journal, [Column("a", 1024, {})], "float32")
    assert all(shards.has(index) for index in range(told))
    assert len(journal.keys()) in (told, told + 1)
    assert [int(vectors["a"].max()) for _, vectors in shards] == list(range(len(journal.keys())))


def test_a_folder_of_shards_is_discarded_but_never_one_with_other_files(opened: Any, tmp_path: Path) -> None:
    shards = opened()
    shards.write(0, *piece(0))
    (tmp_path / "out.shards/.00000001.safetensors.partial").write_bytes(b"x")
    (tmp_path / "out.shards/madaug--1.state.safetensors").write_bytes(b"of the seed -1")
    (tmp_path / "out.shards/thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        discard(tmp_path / "out.shards")
    assert len(list((tmp_path / "out.shards").iterdir())) == 4
    (tmp_path / "out.shards/thesis.tex").unlink()
    discard(tmp_path / "out.shards")
    assert not (tmp_path / "out.shards").exists()
    discard(tmp_path / "out.shards")


def test_shards_without_a_journal_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="open_journal"):
        Shards(tmp_path, NoJournal(), COLUMNS, "float32")


def test_the_journal_keeps_rows_a_line_a_shard(opened: Any, tmp_path: Path) -> None:
    shards = opened()
    shards.write(5, *piece(5))
    _, line = (tmp_path / "out.journal").read_text().splitlines()
    assert json.loads(line)["key"] == "00000005" and json.loads(line)["value"]["rows"] == piece(5)[0]
