"""What every command that writes a directory promises, held against every such command there is."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import warm
from conftest import ROOT, command
from pomona.runtime.settings import Settings
from pomona_cli.directory import DirectoryCommand
from pomona_cli.options import Face
from specimens import COMMANDS, DIRECTORIES

EVERY = [c for c in COMMANDS if isinstance(c, DirectoryCommand)]
every_directory = pytest.mark.parametrize("name", [c.name for c in EVERY])


@pytest.fixture
def run(pomona, tmp_path: Path, tiny_model: Path) -> Any:
    """Run a command with its specimen's arguments; the output directory is ``out`` unless told."""

    def go(name: str, *args: str, output: str | None = "out", quick: bool = True, **more: Any) -> Any:
        specimen = DIRECTORIES[name]
        made = specimen.quick(tmp_path) if quick else specimen.slow(tmp_path, tiny_model)
        more = {"cold": not specimen.heavy, **more}
        return pomona(name, *made, *args, *(["-o", output] if output else []), **more)

    return go


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a run but for what its manifest sets apart."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    manifest = json.loads(found.pop("manifest.json"))
    del manifest["volatile"]
    return {**found, "manifest": json.dumps(manifest).encode()}


@pytest.mark.parametrize("cli", EVERY, ids=lambda c: c.name)
def test_stems_agree_in_every_room_of_the_house(cli: DirectoryCommand) -> None:
    assert cli.name in DIRECTORIES, "add an invocation to tests/specimens.py"
    for name in ("__init__.py", "config.py", "run.py"):
        assert (ROOT / "lib/pomona/methods" / cli.stem / name).is_file()
    assert (ROOT / "cli/pomona_cli/commands" / f"{cli.stem}.py").is_file()
    assert list((ROOT / "tests/methods" / cli.stem).glob("test_*.py"))


@pytest.mark.parametrize("cli", EVERY, ids=lambda c: c.name)
def test_every_field_is_an_option_with_its_help_and_its_default(cli: DirectoryCommand, pomona) -> None:
    text = " ".join(pomona(cli.name, "--help", env={"COLUMNS": "400"}).stdout.decode().split())
    for owner in (cli.config, Settings, Face):
        for field in dataclasses.fields(owner):
            assert f"--{field.name.replace('_', '-')}" in text, field.name
            if field.default not in (None, False, ()) and field.default is not True:
                assert f"(default: {field.default})" in text, field.name
    assert "pomona " + cli.name in text, "the help has an example"


@every_directory
def test_an_unknown_option_is_a_usage_error_with_a_near_one(name: str, pomona) -> None:
    done = pomona(name, "--lmit", "3")
    assert done.returncode == 2 and b"--limit" in done.stderr and done.stdout == b""
    assert len(done.stderr.splitlines()) == 2


@every_directory
def test_the_directory_is_whole_and_standard_output_is_one_summary_line(name: str, run, tmp_path: Path) -> None:
    done = run(name)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    summary = json.loads(line)
    assert summary["command"] == name and summary["run"] == "out"
    manifest = json.loads((tmp_path / "out/manifest.json").read_bytes())
    files = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"} and manifest["state"] == "complete"
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith((".", "out"))} == {"out"}


@every_directory
def test_missing_parents_of_the_directory_are_made(name: str, run, tmp_path: Path) -> None:
    assert run(name, output="runs/today/a").returncode == 0
    assert (tmp_path / "runs/today/a/manifest.json").is_file()


@every_directory
def test_an_existing_directory_is_refused_replaced_or_built_on_as_told(name: str, run, tmp_path: Path) -> None:
    first = run(name)
    before = contents(tmp_path / "out")
    refused = run(name)
    assert refused.returncode == 6 and b"--overwrite" in refused.stderr and b"--resume" in refused.stderr
    again = run(name, "--resume")
    assert again.returncode == 0 and again.stdout == first.stdout and b"finished already" in again.stderr
    replaced = run(name, "--overwrite")
    assert replaced.returncode == 0 and contents(tmp_path / "out") == before


@every_directory
def test_a_directory_of_somebody_else_is_never_replaced(name: str, run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("x")
    for flag in ("--overwrite", "--resume"):
        done = run(name, flag)
        assert done.returncode == 6 and b"thesis" not in done.stderr
    assert (tmp_path / "out/thesis.tex").read_text() == "x"
    (tmp_path / "file").write_text("x")
    assert run(name, "--overwrite", output="file").returncode == 6 and (tmp_path / "file").read_text() == "x"


@every_directory
def test_damage_to_a_finished_directory_is_noticed_and_mended(name: str, run, tmp_path: Path) -> None:
    run(name)
    before = contents(tmp_path / "out")
    victim = sorted(n for n in before if n not in ("manifest", "journal.jsonl"))[0]
    (tmp_path / "out" / victim).write_bytes(b"")
    assert run(name, "--resume").returncode == 0
    assert contents(tmp_path / "out") == before


@every_directory
def test_a_dry_run_prints_a_plan_and_writes_nothing(name: str, run, tmp_path: Path) -> None:
    DIRECTORIES[name].quick(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = run(name, "-n")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dry_run"] is True
    assert sorted(tmp_path.iterdir()) == before


@every_directory
def test_a_dumped_configuration_gives_the_same_run(name: str, run, pomona, tmp_path: Path) -> None:
    dumped = run(name, "--dump-config")
    assert dumped.returncode == 0, dumped.stderr
    (tmp_path / "c.json").write_bytes(dumped.stdout)
    inputs = DIRECTORIES[name].quick(tmp_path)[: DIRECTORIES[name].inputs]
    assert pomona(name, *inputs, "--config", "c.json").returncode == 0
    once = contents(tmp_path / "out")
    assert run(name, "--overwrite").returncode == 0
    assert contents(tmp_path / "out") == once


@every_directory
@pytest.mark.parametrize(
    ("content", "message"),
    [("limti = 3", b'did you mean "limit"'), ("limit = 'x'", b"it must be int"), ("limit = ", b"not TOML")],
)
def test_a_wrong_configuration_is_a_usage_error(name: str, run, tmp_path: Path, content: str, message: bytes) -> None:
    (tmp_path / "c.toml").write_text(content)
    done = run(name, "--config", "c.toml")
    assert done.returncode == 2 and message in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", b"not UTF-8"),
        (b"[" * 100_000, b"not JSON"),
        (b'{"study": "separation", "a0": 1' + b"0" * 400 + b"}", b"--a0 is inf"),
    ],
    ids=["binary", "nested", "huge"],
)
def test_a_hostile_configuration_is_a_usage_error(pomona, tmp_path: Path, content: bytes, message: bytes) -> None:
    (tmp_path / "c.json").write_bytes(content)
    done = pomona("attn-compare", "--config", "c.json")
    assert done.returncode == 2 and message in done.stderr, done.stderr


@every_directory
@pytest.mark.parametrize("args", [["--limit", "-1"], ["--overwrite", "--resume"], ["-q", "-v"], ["--batch-size", "0"]])
def test_options_out_of_range_or_at_odds_are_usage_errors(name: str, run, args: list[str]) -> None:
    assert run(name, *args, output=None).returncode == 2


@pytest.mark.parametrize("name", [cli.name for cli in EVERY if not cli.file_suffixes])
def test_a_directory_is_not_written_to_standard_output(name: str, run) -> None:
    assert run(name, "-o", "-", output=None).returncode == 2


@every_directory
def test_quiet_says_nothing_and_no_colour_reaches_a_file(name: str, run) -> None:
    assert run(name, "-q").stderr == b""
    assert b"\x1b" not in run(name, "-v", "--overwrite").stderr


@every_directory
def test_an_error_shows_a_traceback_only_when_asked(name: str, pomona) -> None:
    assert b"Traceback" not in pomona(name, "absent.jsonl", "-o", "out").stderr
    assert b"Traceback" in pomona(name, "absent.jsonl", "-o", "out", "--debug").stderr


@every_directory
def test_a_stray_print_cannot_reach_standard_output(name: str, run, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "import pomona.io.directory as d\n"
        "keep = d.RunDirectory.publish\n"
        "def publish(self, *a, **k):\n"
        "    print('stray'); os.write(1, b'stray'); os.system('echo stray')\n"
        "    return keep(self, *a, **k)\n"
        "d.RunDirectory.publish = publish\n"
    )
    clean = run(name)
    dirty = run(name, "--overwrite", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"})
    assert b"stray" in dirty.stderr and _repeatable(dirty.stdout) == _repeatable(clean.stdout)


@every_directory
def test_closed_and_full_ends_of_standard_output(name: str, pomona, tmp_path: Path) -> None:
    arguments = [name, *DIRECTORIES[name].quick(tmp_path), "-q", "-o"]
    cold = not DIRECTORIES[name].heavy
    reader, closed = os.pipe()
    os.close(reader)
    with os.fdopen(closed, "wb", 0) as nobody, Path("/dev/full").open("wb", 0) as full:
        done = pomona(*arguments, "a", stdout=nobody, cold=cold)
        assert (done.returncode, done.stderr) == (0, b"")
        done = pomona(*arguments, "b", stdout=full, cold=cold)
    assert done.returncode == 6
    assert done.stderr.splitlines() == [
        f"pomona {name}: error: cannot write standard output: no space left on the device".encode()
    ]


@every_directory
def test_a_full_disk_leaves_no_directory(name: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; it is met while the directory is being filled."""
    line = " ".join(f"'{word}'" for word in command(name, *DIRECTORIES[name].quick(tmp_path)))
    shell = ["bash", "-c", f"ulimit -f 2; {line} -q -o out"]
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 6 and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def _repeatable(stdout: bytes) -> dict[str, Any]:
    """The one summary line without what no run can repeat."""
    return {name: value for name, value in json.loads(stdout).items() if name not in ("peak_rss_mb", "seconds")}


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Any:
    """The files of a command's slow run, and what its manifest says of them; from a cold start."""

    @functools.cache
    def find(name: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        folder = tmp_path_factory.mktemp("whole")
        words = command(name, *DIRECTORIES[name].slow(folder, tiny_model), "-o", "out")
        subprocess.run(words, cwd=folder, env=warm.SURROUNDINGS, check=True, capture_output=True)
        found = contents(folder / "out")
        return found, json.loads(found.pop("manifest"))["files"]

    return find


@every_directory
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_a_signal_ended_resumes_to_the_same_bytes(
    name: str, number: int, pomona, uninterrupted, tmp_path: Path, tiny_model: Path
) -> None:
    arguments = DIRECTORIES[name].slow(tmp_path, tiny_model)
    resumed = command(name, *arguments, "-o", "out", "--resume")
    process = warm.start(resumed, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    keeps = DIRECTORIES[name].keeps
    while not (_lines(tmp_path / "out.journal") >= 3 if keeps else list(tmp_path.glob(".out*/*.safetensors"))):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -number and b"Traceback" not in stderr
    left = {p.name for p in tmp_path.iterdir() if "out" in p.name}
    kept = {"out.journal", *DIRECTORIES[name].leaves} if keeps else set()
    assert left == kept or (number == signal.SIGKILL and left >= kept and "out" not in left)
    done = pomona(*resumed[3:])
    assert done.returncode == 0, done.stderr
    second = contents(tmp_path / "out")
    manifest = json.loads(second.pop("manifest"))
    assert second == uninterrupted(name)[0] and manifest["files"] == uninterrupted(name)[1]
    assert {p.name for p in tmp_path.iterdir() if "out" in p.name} == {"out"}


@every_directory
def test_a_folder_with_somebody_elses_manifest_is_never_replaced(name: str, run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for manifest in ('{"name": "a web application"}', "{}", "[" * 100_000, '{"settings": {}}'):
        (tmp_path / "out/manifest.json").write_text(manifest)
        for flag in ("--overwrite", "--resume"):
            assert run(name, flag).returncode == 6
    assert (tmp_path / "out/manifest.json").read_text() == manifest


@every_directory
def test_a_link_to_a_directory_is_written_through(name: str, run, tmp_path: Path) -> None:
    assert run(name, output="real").returncode == 0
    (tmp_path / "link").symlink_to("real")
    before = contents(tmp_path / "real")
    assert run(name, "--overwrite", output="link").returncode == 0
    after = contents(tmp_path / "real")
    assert (tmp_path / "link").is_symlink() and {**after, "manifest": b""} == {**before, "manifest": b""}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("name", ["features.csv", "features.JSON", "features.npy.gz", "features.pt"])
def test_a_file_of_a_kind_that_is_not_written_does_not_become_a_directory(name: str, pomona) -> None:
    done = pomona("diffeat-extract", "-n", "-o", name)
    assert (done.returncode, done.stdout) == (2, b"") and b"ends in .parquet, .npy, .safetensors" in done.stderr


def test_a_dash_is_standard_output_for_a_command_that_streams(pomona) -> None:
    done = pomona("diffeat-extract", "-o", "-", "--limit", "2")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done.stderr
