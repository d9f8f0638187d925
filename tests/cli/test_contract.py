"""What every stream command promises, held against every stream command there is."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import warm
from conftest import ROOT, command
from pomona.io.stream import StreamOptions
from pomona.runtime.settings import Settings
from pomona_cli.options import Face
from pomona_cli.streaming import StreamCommand
from specimens import COMMANDS, LISTS, RECORDS, SPECIMENS, STREAMS, jsonl

KEYS = {c.name: c.own_key for c in COMMANDS if isinstance(c, StreamCommand)}
every_stream = pytest.mark.parametrize("name", STREAMS)


@pytest.fixture
def run(pomona, tmp_path: Path, tiny_model: Path) -> Any:
    """Run a stream command with its specimen's options on some bytes of input."""

    def go(name: str, *args: str, data: bytes = jsonl(RECORDS), file: str = "-", **more: Any) -> Any:
        options = SPECIMENS[name].options(tmp_path, tiny_model)
        more = {"cold": not SPECIMENS[name].heavy, **more}
        return pomona(name, file, *options, *args, stdin=data if file == "-" else b"", **more)

    return go


def lines(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.splitlines()]


def without(key: str, records: list[Any]) -> list[Any]:
    return [{k: v for k, v in record.items() if k != key} for record in records]


# --- the house is complete for every command ------------------------------------------------------------------------


@pytest.mark.parametrize("cli", [c for c in COMMANDS if isinstance(c, StreamCommand)], ids=lambda c: c.name)
def test_stems_agree_in_every_room_of_the_house(cli: StreamCommand) -> None:
    assert cli.name in SPECIMENS, "add an invocation to tests/specimens.py"
    assert (ROOT / "lib/pomona/methods" / cli.stem / "__init__.py").is_file()
    assert (ROOT / "lib/pomona/methods" / cli.stem / "config.py").is_file()
    assert (ROOT / "lib/pomona/methods" / cli.stem / "run.py").is_file()
    assert (ROOT / "cli/pomona_cli/commands" / f"{cli.stem}.py").is_file()
    assert list((ROOT / "tests/methods" / cli.stem).glob("test_*.py"))


@pytest.mark.parametrize("cli", [c for c in COMMANDS if isinstance(c, StreamCommand)], ids=lambda c: c.name)
def test_every_field_is_an_option_with_its_help_and_its_default(cli: StreamCommand, pomona) -> None:
    text = " ".join(pomona(cli.name, "--help", env={"COLUMNS": "400"}).stdout.decode().split())
    for owner in (cli.config, Settings, StreamOptions, Face):
        for field in dataclasses.fields(owner):
            assert f"--{field.name.replace('_', '-')}" in text, field.name
            if field.default not in (None, False) and field.default is not True:
                assert f"(default: {field.default})" in text, field.name
    assert "pomona " + cli.name in text, "the help has an example"


@every_stream
def test_an_unknown_option_is_a_usage_error_with_a_near_one(name: str, pomona) -> None:
    done = pomona(name, "--lmit", "3")
    assert done.returncode == 2
    assert b"--limit" in done.stderr and done.stdout == b""
    assert len(done.stderr.splitlines()) == 2


def test_an_unknown_command_is_a_usage_error_with_a_near_one(pomona) -> None:
    done = pomona(STREAMS[0][:-1])
    assert done.returncode == 2 and STREAMS[0].encode() in done.stderr


@pytest.mark.parametrize("name", LISTS)
def test_a_list_command_prints_one_object_per_line(name: str, pomona) -> None:
    done = pomona(name)
    assert done.returncode == 0, done.stderr
    assert lines(done.stdout)


# --- records in, records out ----------------------------------------------------------------------------------------


@every_stream
def test_stdout_is_the_records_in_order_with_every_field_kept(name: str, run) -> None:
    done = run(name)
    assert done.returncode == 0, done.stderr
    found = lines(done.stdout)
    assert without(KEYS[name], found) == RECORDS
    assert all(isinstance(record[KEYS[name]], dict) for record in found)
    assert list(found[0])[:-1] == list(RECORDS[0])


@every_stream
def test_a_file_stdin_and_every_layout_give_the_same_records(name: str, run, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    expected = lines(run(name).stdout)
    (tmp_path / "a.json").write_text(json.dumps(RECORDS, indent=4))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(RECORDS)))
    flat = without("kept", RECORDS)
    pq.write_table(pa.Table.from_pylist(flat), tmp_path / "a.parquet")
    assert lines(run(name, file="a.json").stdout) == expected
    assert lines(run(name, file="a.jsonl.gz").stdout) == expected
    assert lines(run(name, file="a.parquet").stdout) == without("kept", expected)


@every_stream
def test_an_output_file_gets_the_records_and_stdout_one_summary_line(name: str, run, tmp_path: Path) -> None:
    expected = run(name).stdout
    done = run(name, "-o", "out.jsonl")
    assert done.returncode == 0, done.stderr
    (summary,) = lines(done.stdout)
    assert summary["command"] == name
    assert summary["in"] == summary["out"] + summary["filtered"] + summary["rejected"] == len(RECORDS)
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_bytes())
    assert manifest["state"] == "complete"
    assert manifest["inputs"][0]["sha256"] == hashlib.sha256(jsonl(RECORDS)).hexdigest()
    assert manifest["output"]["sha256"] == hashlib.sha256(expected).hexdigest()
    hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert hidden == []


@every_stream
def test_the_same_input_gives_the_same_bytes(name: str, run, tmp_path: Path) -> None:
    heavy = SPECIMENS[name].heavy
    for suffix in ("jsonl.gz", "json", "csv", "parquet"):
        both = []
        for number in (1, 2):
            cold = number == 1 and suffix == "csv" if heavy else number == 2
            done = run(name, "-o", f"out{number}.{suffix}", cold=cold)
            assert done.returncode == 0, done.stderr
            both.append((tmp_path / f"out{number}.{suffix}").read_bytes())
        assert both[0] == both[1]


@every_stream
def test_alpaca_json_leaves_out_what_the_command_added(name: str, run, tmp_path: Path) -> None:
    done = run(name, "--emit", "alpaca-json", "-o", "train.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "train.json").read_bytes() == json.dumps(RECORDS, indent=4).encode("ascii")


@every_stream
def test_the_limit_counts_input_records(name: str, run) -> None:
    assert without(KEYS[name], lines(run(name, "--limit", "3").stdout)) == RECORDS[:3]
    done = run(name, "--limit", "0")
    assert (done.returncode, done.stdout) == (0, b"")


@every_stream
@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_no_records_is_no_error_unless_asked(name: str, run, data: bytes) -> None:
    done = run(name, data=data)
    assert (done.returncode, done.stdout) == (0, b"")
    assert run(name, "--require-records", data=data).returncode == 4


@every_stream
def test_hostile_strings_come_out_as_they_went_in(name: str, run) -> None:
    hostile = [
        "\x1b[2J\x1b]0;owned\x07",
        "<script>alert(1)</script>",
        "{instruction}{0}%s",
        "../../etc/passwd",
        "\u202e\ufeff\u2028",
        "\x00\x7f",
    ]
    records = [
        {**RECORDS[n], "instruction": text, "input": text, "output": text or "x", text: text}
        for n, text in enumerate(hostile)
    ]
    done = run(name, data=jsonl(records))
    assert done.returncode == 0, done.stderr
    assert without(KEYS[name], lines(done.stdout)) == records
    assert b"\x1b" not in done.stderr


# --- bad input ------------------------------------------------------------------------------------------------------

BAD = [
    b"{oops\n",
    b'{"instruction": "x"}\n',
    b'{"instruction": 1, "output": "y"}\n',
    b'{"a": NaN}\n',
    b"\xff\xfe\n",
    b"[]\n",
]


@every_stream
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_record_stops_the_run_with_its_place(name: str, run, tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(RECORDS[:2]) + bad + jsonl(RECORDS[2:4]))
    done = run(name, "-o", "out.jsonl", file="in.jsonl")
    assert done.returncode == 4
    assert b"in.jsonl:3: " in done.stderr and done.stdout == b""
    assert not (tmp_path / "out.jsonl").exists()


@every_stream
def test_bad_records_can_be_set_aside_with_reasons(name: str, run, tmp_path: Path) -> None:
    data = b"".join(bad + jsonl([record]) for bad, record in zip(BAD, RECORDS, strict=False))
    done = run(name, "--rejects", "bad.jsonl", "-o", "out.jsonl", data=data)
    assert done.returncode == 3, done.stderr
    (summary,) = lines(done.stdout)
    assert (summary["in"], summary["out"], summary["rejected"]) == (2 * len(BAD), len(BAD), len(BAD))
    assert sum(summary["rejected_by"].values()) == len(BAD)
    assert without(KEYS[name], lines((tmp_path / "out.jsonl").read_bytes())) == RECORDS[: len(BAD)]
    rejects = lines((tmp_path / "bad.jsonl").read_bytes())
    assert [reject["line"] for reject in rejects] == [1, 3, 5, 7, 9, 11]
    assert all(reject["reason"] for reject in rejects)


@every_stream
def test_a_missing_input_is_code_5_with_a_near_name(name: str, run, tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_bytes(jsonl(RECORDS))
    done = run(name, file="record.jsonl")
    assert done.returncode == 5 and b"records.jsonl" in done.stderr


# --- outputs --------------------------------------------------------------------------------------------------------


@every_stream
def test_an_existing_output_is_refused_before_any_work(name: str, run, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("mine")
    done = run(name, "-o", "out.jsonl")
    assert done.returncode == 6 and b"--overwrite" in done.stderr
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    assert run(name, "-o", "out.jsonl", "--overwrite").returncode == 0
    assert len(lines((tmp_path / "out.jsonl").read_bytes())) == len(RECORDS)


@every_stream
@pytest.mark.parametrize("target", ["absent/out.jsonl", "folder", "file/out.jsonl"])
def test_an_output_that_cannot_be_written_is_code_6(name: str, run, tmp_path: Path, target: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    done = run(name, "-o", target)
    assert done.returncode == 6, done.stderr
    assert len(done.stderr.splitlines()) <= 2


@every_stream
def test_an_output_over_the_size_limit_leaves_nothing(name: str, run, tmp_path: Path) -> None:
    import resource

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = run(name, "-o", "out.jsonl", preexec_fn=small)
    assert done.returncode == 6, done.stderr
    assert b"size limit" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


@every_stream
def test_two_runs_on_one_output_do_not_mix(name: str, run, tmp_path: Path, tiny_model: Path) -> None:
    options = SPECIMENS[name].options(tmp_path, tiny_model)
    words = command(name, "-", *options, "-o", "out.jsonl")
    first = warm.start(words, not SPECIMENS[name].heavy, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path)
    assert first.stdin is not None
    try:
        while not (tmp_path / ".out.jsonl.pid").exists():
            assert first.poll() is None
        second = run(name, "-o", "out.jsonl")
        assert second.returncode == 6, second.stderr
        assert str(first.pid).encode() in second.stderr
    finally:
        first.stdin.write(jsonl(RECORDS))
        first.stdin.close()
        assert first.wait() == 0
    assert len(lines((tmp_path / "out.jsonl").read_bytes())) == len(RECORDS)


@every_stream
def test_a_dry_run_prints_a_plan_and_writes_nothing(name: str, run, tmp_path: Path) -> None:
    run(name, "--limit", "0")  # lets the specimen write what it needs
    before = sorted(tmp_path.iterdir())
    done = run(name, "-n", "-o", "out.jsonl")
    assert done.returncode == 0, done.stderr
    (plan,) = lines(done.stdout)
    assert plan["dry_run"] is True
    assert sorted(tmp_path.iterdir()) == before


# --- configuration --------------------------------------------------------------------------------------------------


@every_stream
def test_a_dumped_configuration_gives_the_same_run(name: str, run, pomona, tmp_path: Path) -> None:
    dumped = run(name, "--dump-config", "--limit", "5")
    assert dumped.returncode == 0, dumped.stderr
    (tmp_path / "c.json").write_bytes(dumped.stdout)
    again = pomona(name, "--config", "c.json", stdin=jsonl(RECORDS))
    assert again.stdout == run(name, "--limit", "5").stdout
    assert (
        pomona(name, "--config", "c.json", "--limit", "2", stdin=jsonl(RECORDS)).stdout
        == run(name, "--limit", "2").stdout
    )


@every_stream
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("limti = 3", b'did you mean "limit"'),
        ("limit = 'x'", b"it must be int"),
        ("limit = ", b"not TOML"),
        ("emit = 'f'", b"one of"),
    ],
)
def test_a_wrong_configuration_is_a_usage_error(name: str, run, tmp_path: Path, content: str, message: bytes) -> None:
    (tmp_path / "c.toml").write_text(content)
    done = run(name, "--config", "c.toml")
    assert done.returncode == 2 and message in done.stderr, done.stderr


@every_stream
@pytest.mark.parametrize(
    "args", [["--limit", "-1"], ["--overwrite", "--resume"], ["-q", "-v"], ["--resume"], ["--batch-size", "0"]]
)
def test_options_out_of_range_or_at_odds_are_usage_errors(name: str, run, args: list[str]) -> None:
    assert run(name, *args).returncode == 2


# --- what people see ------------------------------------------------------------------------------------------------


@every_stream
def test_quiet_says_nothing_and_no_colour_reaches_a_file(name: str, run) -> None:
    assert run(name, "-q").stderr == b""
    assert b"\x1b" not in run(name, "-v").stderr
    forced = run(name, "--color", "always", "--limit", "x")
    assert forced.returncode == 2


@every_stream
def test_an_error_shows_a_traceback_only_when_asked(name: str, run) -> None:
    assert b"Traceback" not in run(name, file="absent.jsonl").stderr
    assert b"Traceback" in run(name, "--debug", file="absent.jsonl").stderr


@every_stream
def test_a_stray_print_cannot_reach_standard_output(name: str, run, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, threading\n"
        "import pomona.io.stream as s\n"
        "keep = s.Stream.emit\n"
        "def emit(self, record):\n"
        "    print('stray'); os.write(1, b'stray'); os.system('echo stray')\n"
        "    keep(self, record)\n"
        "s.Stream.emit = emit\n"
    )
    clean = run(name, "--limit", "3")
    dirty = run(name, "--limit", "3", env={"PYTHONPATH": str(tmp_path)})
    assert b"stray" in dirty.stderr
    assert dirty.stdout == clean.stdout


def test_completion_offers_commands_and_options(pomona) -> None:
    env = {"_POMONA_COMPLETE": "complete_bash", "COMP_WORDS": "pomona i", "COMP_CWORD": "1"}
    assert b"ifd-score" in pomona(env=env).stdout
    env = {"_POMONA_COMPLETE": "complete_bash", "COMP_WORDS": "pomona ifd-score --keep", "COMP_CWORD": "2"}
    assert b"--keep-top" in pomona(env=env).stdout


def test_python_dash_m_is_the_same_program(pomona) -> None:
    script = shutil.which("pomona", path=os.pathsep.join([str(Path(command()[0]).parent)]))
    assert script is not None
    assert subprocess.run([script, "--version"], capture_output=True).stdout == pomona("--version").stdout
    assert re.fullmatch(rb"pomona \d+\.\d+\.\d+\S*\n", pomona("--version").stdout)
