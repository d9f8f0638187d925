"""A run that ends in one file: absent, old, or complete, wherever it is killed, and finished only with its manifest."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from faults.storage import room
from pomona.errors import OutputError, PomonaError, UsageError
from pomona.io.directory import RunDirectory
from pomona.io.journal import Journal
from pomona.io.single import RunFile
from pomona.runtime.progress import Quiet
from pomona.runtime.settings import Settings
from pomona_cli.directory import DirectoryCommand
from pomona_cli.options import Face
from pomona_cli.output import Console

SOURCES = [{"name": "images", "bytes": 1, "sha256": "00"}]


def run(
    output: Path,
    text: str = "new",
    *,
    kind: type[RunDirectory] = RunFile,
    beside: Mapping[str, str] | None = None,
    sources: list[dict[str, Any]] = SOURCES,
    measured: Mapping[str, Any] | None = None,
    **settings: Any,
) -> str:
    """A run of two shards that writes `text`; says whether it was finished before, went on, or began."""
    set_to = Settings(output=output, **settings)
    work = kind("test", (), set_to, described={"text": text}, progress=Quiet(), emit=print)
    work.transient = True
    with work:
        if (finished := work.finished_before(sources)) is not None:
            assert finished == {"kept": 2} and work.measured == (measured or {})
            return "finished"
        work.open_journal({"text": text, "sources": sources})
        assert isinstance(work.journal, Journal)
        before = len(work.journal)
        work.kept.mkdir(exist_ok=True)
        for index in range(before, 2):
            (work.kept / f"{index:08}.safetensors").write_text(text)
            work.journal.append(f"{index:08}", {"text": text})
        work.measured.update(measured or {})
        with work.publish(sources, lambda: {"kept": 2}) as folder:
            assert work.path is not None
            name = work.path.name if kind is RunFile else "table.npy"
            for suffix, content in {**(beside or {}), "": text}.items():
                (folder / f"{name}{suffix}").write_text(content)
    return f"went on from {before}" if before else "began"


def there(folder: Path) -> dict[str, str]:
    """Every file, but of manifests only what does not change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.read_text()
    for name in found:
        if name.endswith("manifest.json"):
            found[name] = json.dumps({k: v for k, v in json.loads(found[name]).items() if k != "volatile"})
    return found


def test_the_file_its_companions_and_the_manifest_are_all_that_is_left(tmp_path: Path) -> None:
    assert run(tmp_path / "a.npy", beside={".json": "{}"}, measured={"rss": 3}) == "began"
    assert set(there(tmp_path)) == {"a.npy", "a.npy.json", "a.npy.manifest.json"}
    manifest = json.loads((tmp_path / "a.npy.manifest.json").read_text())
    assert manifest["output"]["name"] == "a.npy" and manifest["output"]["bytes"] == 3
    assert set(manifest["beside"]) == {"a.npy.json"} and manifest["state"] == "complete"
    assert manifest["inputs"] == SOURCES and manifest["results"] == {"kept": 2}
    assert manifest["volatile"]["measured"] == {"rss": 3}
    assert {p.name for p in tmp_path.iterdir()} == {"a.npy", "a.npy.json", "a.npy.manifest.json"}


def test_missing_parents_are_made_and_a_link_is_written_through(tmp_path: Path) -> None:
    run(tmp_path / "runs/today/a.npy")
    (tmp_path / "link.npy").symlink_to("runs/today/a.npy")
    assert run(tmp_path / "link.npy", "other", overwrite=True, beside={}) == "began"
    assert (tmp_path / "link.npy").is_symlink() and (tmp_path / "runs/today/a.npy").read_text() == "other"


def test_an_existing_file_is_refused_replaced_or_recognised_as_told(tmp_path: Path) -> None:
    run(tmp_path / "a.npy")
    before = there(tmp_path)
    with pytest.raises(OutputError, match="exists") as caught:
        run(tmp_path / "a.npy")
    assert "--overwrite" in str(caught.value.hint) and "--resume" in str(caught.value.hint)
    assert run(tmp_path / "a.npy", resume=True) == "finished"
    assert run(tmp_path / "a.npy", overwrite=True) == "began"
    assert there(tmp_path) == before


def test_a_finished_file_of_other_settings_or_other_input_is_not_resumed(tmp_path: Path) -> None:
    run(tmp_path / "a.npy")
    before = there(tmp_path)
    for changed in ({"text": "other"}, {"sources": []}):
        with pytest.raises(UsageError, match="other settings or other input") as caught:
            run(tmp_path / "a.npy", resume=True, **changed)  # type: ignore[arg-type]
        assert "--overwrite" in str(caught.value.hint)
    assert there(tmp_path) == before


def test_damage_to_a_finished_output_is_noticed_and_mended(tmp_path: Path) -> None:
    run(tmp_path / "a.npy", beside={".json": "{}"})
    before = there(tmp_path)
    for victim in ("a.npy", "a.npy.json"):
        for damage in (lambda path: path.write_text("xyz"), Path.unlink):
            damage(tmp_path / victim)
            assert run(tmp_path / "a.npy", beside={".json": "{}"}, resume=True) == "began"
            assert there(tmp_path) == before


def test_a_file_of_somebody_else_is_never_resumed_and_a_directory_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_text("thesis")
    for manifest in (None, "[", "{}", '{"output": {}}', '{"output": 1, "settings": 1}'):
        if manifest is not None:
            (tmp_path / "a.npy.manifest.json").write_text(manifest)
        with pytest.raises(OutputError, match="no output of a run"):
            run(tmp_path / "a.npy", resume=True)
    (tmp_path / "b.npy").mkdir()
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match="it is a directory"):
            run(tmp_path / "b.npy", **flags)
    assert (tmp_path / "a.npy").read_text() == "thesis" and list((tmp_path / "b.npy").iterdir()) == []


@pytest.mark.parametrize("name", ["../victim", "/etc/victim", "victim", "a.npy.journal", "a.npy.manifest.json"])
def test_a_manifest_cannot_name_files_that_do_not_belong_to_the_output(tmp_path: Path, name: str) -> None:
    run(tmp_path / "a.npy", beside={".json": "{}"})
    (tmp_path / "victim").write_text("x")
    path = tmp_path / "a.npy.manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"beside": {name: {"bytes": 1}}}))
    with pytest.raises(OutputError, match="no output of a run"):
        run(tmp_path / "a.npy", resume=True)
    assert run(tmp_path / "a.npy", overwrite=True) == "began" and (tmp_path / "victim").read_text() == "x"


def test_companions_of_the_file_that_is_replaced_go_with_it(tmp_path: Path) -> None:
    run(tmp_path / "a.npy", beside={".json": "{}", ".svg": "<svg/>"})
    (tmp_path / "a.npy.notes").write_text("mine")
    run(tmp_path / "a.npy", "other", beside={".json": "[]"}, overwrite=True)
    assert set(there(tmp_path)) == {"a.npy", "a.npy.json", "a.npy.manifest.json", "a.npy.notes"}


@pytest.mark.parametrize("content", [{}, {"a.npy": "x", "b.json": "x"}, {"a.npy": "x", "a.npy.manifest.json": "x"}])
def test_files_of_other_names_are_a_mistake_of_the_caller(tmp_path: Path, content: dict[str, str]) -> None:
    work = RunFile("test", (), Settings(output=tmp_path / "a.npy"), described={}, progress=Quiet(), emit=print)
    with work, pytest.raises(ValueError, match="belong"), work.publish([], dict) as folder:
        for name, text in content.items():
            (folder / name).write_text(text)
    assert there(tmp_path) == {}


# --- ends of the process ---------------------------------------------------------------------------------------------


def _dies_at(number: int) -> None:
    """Make this process vanish, without any tidying, before its `number`-th change of a name."""
    calls = 0

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(path: Path, *args: Any, **named: Any) -> Any:
            nonlocal calls
            if not path.name.startswith(".") or function is replace:
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(path, *args, **named)

        return guarded

    replace = Path.replace
    for name in ("replace", "unlink", "rmdir", "mkdir", "rename"):
        setattr(Path, name, guard(getattr(Path, name)))


def killed(number: int, action: Callable[[], object]) -> bool:
    """Whether `action`, done by a child of this process, was killed at its `number`-th change of a name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which this child does not need
        child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            _dies_at(number)
            action()
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed"
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("before", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("beside", [{}, {".json": "{new}"}], ids=["alone", "sidecar"])
def test_killed_between_any_two_changes_it_is_absent_old_or_new_and_resumes(
    tmp_path: Path, before: bool, beside: dict[str, str]
) -> None:
    run(tmp_path / "whole/a.npy", beside=beside)
    whole = there(tmp_path / "whole")
    old = {".json": "{old}"} if beside else {}
    for number in range(1, 40):
        place = tmp_path / f"at-{number}"
        if before:
            run(place / "a.npy", "old", beside=old)
        was_killed = killed(number, lambda: run(place / "a.npy", beside=beside, overwrite=before))  # noqa: B023
        left = there(place)
        pair = left.get("a.npy"), left.get("a.npy.json", "")
        assert pair[0] in (None, "new", *(["old"] if before else [])), number
        assert not (pair[0] == "new" and pair[1] != beside.get(".json", "")), number
        assert not (pair[0] == "old" and pair[1] == "{new}"), number
        if "a.npy.manifest.json" in left:
            told = json.loads(left["a.npy.manifest.json"])
            assert (told["settings"]["text"], told["output"]["bytes"]) == (pair[0], 3), number
            assert (pair[1] != "") == bool(beside), number
        if not was_killed:
            assert left == whole and number > 5
            return
        with contextlib.suppress(PomonaError):  # killed before anything was kept: the old file is there
            said = run(place / "a.npy", beside=beside, resume=True)
            assert said != "finished" or pair[0] == "new", number
        if there(place) != whole:
            assert pair[0] in (None, "old") and "a.npy.manifest.json" in left, number
            run(place / "a.npy", beside=beside, overwrite=True)
        assert there(place) == whole, number
        assert {p.name for p in place.iterdir()} == set(whole), number
    pytest.fail("the run has more changes than were tried")


def test_an_output_whose_manifest_was_not_written_goes_on_from_its_shards(tmp_path: Path) -> None:
    places = (tmp_path / f"{number}/a.npy" for number in range(1, 40))
    out = next(out for number, out in enumerate(places, 1) if killed(number, lambda: run(out)) and out.exists())  # noqa: B023
    assert there(out.parent).keys() >= {"a.npy", "a.npy.journal"}
    with pytest.raises(OutputError):
        run(out)
    assert run(out, resume=True) == "went on from 2" and run(out, resume=True) == "finished"


def test_a_full_disk_leaves_no_file_and_keeps_the_work(tmp_path: Path) -> None:
    class Full(RunFile):
        @contextlib.contextmanager
        def publish(self, *args: Any) -> Any:
            with room(0), RunFile.publish(self, *args) as folder:
                yield folder

    with pytest.raises((OutputError, OSError)):
        run(tmp_path / "a.npy", kind=Full)
    assert not (tmp_path / "a.npy").exists() and not list(tmp_path.glob(".a*"))
    assert run(tmp_path / "a.npy", resume=True) == "went on from 2"


def test_two_runs_on_one_file_are_refused(tmp_path: Path) -> None:
    first = RunFile("test", (), Settings(output=tmp_path / "a.npy"), described={}, progress=Quiet(), emit=print)
    with first, pytest.raises(OutputError, match="is being written by process"):
        run(tmp_path / "a.npy")


# --- what a run keeps beside its output, file or directory -----------------------------------------------------------


def stopped(output: Path, text: str, kind: type[RunDirectory]) -> None:
    """A run that fails after its first shard."""
    with contextlib.suppress(ZeroDivisionError):
        work = kind("test", (), Settings(output=output), described={"text": text}, progress=Quiet(), emit=print)
        work.transient = True
        with work:
            work.open_journal({"text": text, "sources": SOURCES})
            work.kept.mkdir()
            (work.kept / "00000000.safetensors").write_text(text)
            work.journal.append("00000000", {})
            raise ZeroDivisionError


@pytest.mark.parametrize("kind", [RunFile, RunDirectory])
def test_shards_of_a_stopped_run_stay_for_resume_and_go_with_overwrite(
    tmp_path: Path, kind: type[RunDirectory]
) -> None:
    out = tmp_path / "a.npy"
    stopped(out, "new", kind)
    assert set(there(tmp_path)) == {"a.npy.journal", "a.npy.shards/00000000.safetensors"}
    with pytest.raises(OutputError, match="an earlier run left its work"):
        run(out, kind=kind)
    with pytest.raises(UsageError, match="text = 'new', now it is 'other'"):
        run(out, "other", kind=kind, resume=True)
    assert run(out, kind=kind, resume=True) == "went on from 1"
    assert not [name for name in there(tmp_path) if "shards" in name or "journal" in name]
    stopped(tmp_path / "b.npy", "old", kind)
    assert run(tmp_path / "b.npy", kind=kind, overwrite=True) == "began"
    assert not [name for name in there(tmp_path) if "shards" in name or "journal" in name]


@pytest.mark.parametrize("kind", [RunFile, RunDirectory])
def test_a_run_that_did_nothing_leaves_nothing(tmp_path: Path, kind: type[RunDirectory]) -> None:
    work = kind("test", (), Settings(output=tmp_path / "a.npy"), described={}, progress=Quiet(), emit=print)
    work.transient = True
    with contextlib.suppress(ZeroDivisionError), work:
        work.open_journal({})
        work.kept.mkdir()
        (work.kept / "00000000.safetensors").write_text("a shard without its line")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_of_somebody_else_in_place_of_the_shards_is_left_alone(tmp_path: Path, flag: dict[str, bool]) -> None:
    (tmp_path / "a.npy.shards").mkdir()
    (tmp_path / "a.npy.shards/thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        run(tmp_path / "a.npy", **flag)
    assert there(tmp_path) == {"a.npy.shards/thesis.tex": "x"}


def test_a_transient_directory_holds_no_journal_and_other_settings_do_not_resume_it(tmp_path: Path) -> None:
    assert run(tmp_path / "out", kind=RunDirectory) == "began"
    assert set(there(tmp_path)) == {"out/manifest.json", "out/table.npy"}
    assert run(tmp_path / "out", kind=RunDirectory, resume=True) == "finished"
    with pytest.raises(UsageError, match="other settings or other input") as caught:
        run(tmp_path / "out", "other", kind=RunDirectory, resume=True)
    assert "--overwrite" in str(caught.value.hint)
    (tmp_path / "out/table.npy").write_text("damaged")
    assert run(tmp_path / "out", kind=RunDirectory, resume=True) == "began"


def test_a_transient_run_without_output_works_in_a_folder_that_goes(tmp_path: Path) -> None:
    work = RunDirectory("test", (), Settings(), described={}, progress=Quiet(), emit=print)
    work.transient = True
    with work:
        work.open_journal({"a": 1})
        work.kept.mkdir()
        work.journal.append("00000000", {})
        folder = work.kept.parent
        assert folder.is_dir() and work.path is None
    assert not folder.exists()


def test_a_dry_run_keeps_nothing(tmp_path: Path) -> None:
    for output in (tmp_path / "a.npy", None):
        settings = Settings(output=output, dry_run=True)
        with RunFile("test", (), settings, described={}, progress=Quiet(), emit=print) as work:
            work.open_journal({"a": 1})
            assert not isinstance(work.journal, Journal)
    assert list(tmp_path.iterdir()) == []


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "kind"),
    [("a.npy", RunFile), ("A.NPY", RunFile), ("a.jsonl.gz", RunFile), ("a", RunDirectory), ("a.b", RunDirectory)],
)
def test_a_command_chooses_by_the_suffix_of_its_output(tmp_path: Path, output: str, kind: type[RunDirectory]) -> None:
    assert _kind(tmp_path / output, (".npy", ".jsonl.gz")) is kind
    assert _kind(tmp_path / output, ()) is _kind(None, (".npy",)) is RunDirectory
    (tmp_path / "link.npy").symlink_to(output)
    assert _kind(tmp_path / "link.npy", (".npy", ".jsonl.gz")) is kind


def test_a_file_of_a_kind_that_is_not_written_is_no_name_for_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.npz: a file of this command ends in \.npy"):
        _kind(tmp_path / "a.npz", (".npy",))


def _kind(output: Path | None, suffixes: tuple[str, ...]) -> type[RunDirectory]:
    chosen = []

    class Method:
        @staticmethod
        def run(config: Any, settings: Settings, work: RunDirectory) -> tuple[dict[str, Any], int]:
            chosen.append(type(work))
            return {}, 0

    command = DirectoryCommand("test", "Test", Settings, "", (), file_suffixes=suffixes)
    options = {"Method": Settings(), "Run": Settings(output=output)}
    command.work(Method, (), options, sys.stdout.buffer, Console("test", Face()))
    return chosen[0]
