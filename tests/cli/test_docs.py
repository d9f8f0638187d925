"""Documents in step with the program: what a user reads is what there is."""

from __future__ import annotations

import re
import tomllib

import pytest

import pomona
from conftest import ROOT
from pomona import errors
from specimens import COMMANDS

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAPERS = {
    "ifd-score": "2308.12032",
    "alpagasus-filter": "2307.08701",
    "mera-merge": "2308.15982",
    "meo-convert": "2310.09832",
    "nlpbench-eval": "2309.15630",
    "madaug-train": "2309.04747",
    "erc-train": "2306.16750",
    "mece-run": "2309.12529",
    "diffeat-extract": "2307.08702",
    "attn-compare": "2310.11685",
}


@pytest.mark.parametrize(("name", "paper"), PAPERS.items())
def test_the_readme_lists_each_command_and_marks_what_is_not_there_yet(name: str, paper: str) -> None:
    (row,) = (line for line in README.splitlines() if line.startswith(f"| `{name}`"))
    assert paper in row
    exists = name in {command.name for command in COMMANDS}
    assert ("not yet" in row) != exists


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_every_command_is_in_the_readme(command) -> None:
    assert f"`{command.name}`" in README or f"`pomona {command.name}`" in README


def test_the_readme_names_only_options_that_exist(pomona) -> None:
    known = set()
    for command in COMMANDS:
        known |= set(re.findall(rb"--[a-z][a-z-]+", pomona(command.name, "--help", env={"COLUMNS": "300"}).stdout))
    known |= set(re.findall(rb"--[a-z][a-z-]+", pomona("--help").stdout))
    foreign = {b"--multi", b"--no-deps"}  # options of accelerate and pip
    used = set(re.findall(r"(?<!\w)--[a-z][a-z-]+", README.replace("--num_processes", "")))
    assert {option.encode() for option in used} - known - foreign == set()


def test_the_readme_gives_every_exit_code_that_the_errors_have() -> None:
    codes = {e.exit_code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)} | {0, 3}
    table = {int(code) for code in re.findall(r"^\| (\d) \|", README, re.M)}
    assert table == codes == set(range(10))


def test_the_help_gives_every_exit_code(pomona) -> None:
    text = " ".join(pomona("--help").stdout.decode().split())
    assert re.findall(r"\b(\d) [a-z]", text[text.index("Exit codes") :]) == [str(n) for n in range(10)]


def test_the_methods_command_tells_paper_claim_and_deviations(pomona) -> None:
    import json

    rows = [json.loads(line) for line in pomona("methods").stdout.splitlines()]
    for row in rows:
        assert row["paper"].endswith(PAPERS[row["command"]])
        assert len(row["claim"]) > 60 and row["deviations"]


def test_the_changelog_has_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changelog or f"## [{pomona.__version__}]" in changelog


def test_constraints_are_bare_pins_of_what_pyproject_asks_for() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[\w.]+", line) for line in pins)
    names = {re.split("==", line)[0].lower().replace("_", "-") for line in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["merge"], *extras["vision"], *extras["rl"], *extras["dev"]]
    assert {re.split(r"[<>=\[]", line)[0].lower().replace("_", "-") for line in wanted} <= names


def test_no_file_names_the_machine_it_was_written_on() -> None:
    import subprocess

    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    pattern = re.compile(r"/(work|root|home/\w+)/|pypi\.org|files\.pythonhosted")
    named = [
        name
        for name in files.splitlines()
        if (ROOT / name).is_file()
        and name != "tests/cli/test_docs.py"
        and pattern.search((ROOT / name).read_text("utf-8", "ignore"))
    ]
    assert named == []
