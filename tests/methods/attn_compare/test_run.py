"""A run from its plan to its directory: what is measured once, what is kept, what is refused."""

from __future__ import annotations

import json
from math import comb
from pathlib import Path
from typing import Any

import pytest

from pomona.errors import CheckFailed, DataError, MissingError, UsageError
from pomona.io.directory import RunDirectory
from pomona.methods.attn_compare import kernels, run
from pomona.methods.attn_compare.config import Config
from pomona.methods.attn_compare.kernels import Kernel, registered
from pomona.methods.attn_compare.separation import study as separation
from pomona.runtime.progress import Quiet
from pomona.runtime.settings import Settings

SMALL: dict[str, Any] = {"study": ("separation",), "kernels": "exp,linear", "sweep": ("m=1,4",), "trials": 40}


def go(path: Path | None, *inputs: str, **given: Any) -> tuple[dict[str, Any], int, RunDirectory, list[Any]]:
    """Summary, exit code, what is left of the work, and the records for standard output."""
    told = {"device": "cpu"}
    told |= {k: given.pop(k) for k in ("resume", "dry_run", "limit", "seed", "device") if k in given}
    settings = Settings(output=path, **told)
    config = Config(**given)
    emitted: list[Any] = []
    work = RunDirectory(
        "attn-compare", inputs, settings, described={"config": config}, progress=Quiet(), emit=emitted.append
    )
    with work:
        summary, code = run.run(config, settings, work)
    return summary, code, work, emitted


def files(folder: Path) -> dict[str, bytes]:
    """All that a run wrote, but for its manifest."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_bytes().splitlines()]


def test_a_run_holds_rows_a_table_figures_and_a_report(tmp_path: Path) -> None:
    summary, code, _, _ = go(tmp_path / "a", **SMALL)
    assert code == 0 and summary["run"] == str(tmp_path / "a")
    assert summary["studies"]["separation"].keys() == {"exp", "linear"}
    assert {*files(tmp_path / "a")} == {
        *("journal.jsonl", "results.jsonl", "results.csv", "report.md"),
        *("figures/separation_sweeps.png", "figures/separation_sweeps.svg"),
    }
    assert len(rows(tmp_path / "a")) == summary["results"]["done"] == 2 * (1 + 2)
    report = (tmp_path / "a/report.md").read_text()
    assert "Why Softmax Attention Outperforms Linear Attention" in report and "2310.11685" in report
    assert "Superiority of Softmax: Unveiling the Performance Edge Over Linear Attention" in report
    assert "Does it separate" in report and "figures/separation_sweeps.svg" in report and "trials: 40" in report


def test_two_jobs_give_the_bytes_of_one(tmp_path: Path) -> None:
    go(tmp_path / "one", **SMALL, jobs=1)
    go(tmp_path / "two", **SMALL, jobs=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_bytes()) for name in ("one", "two")]
    assert manifests[0]["settings"] == manifests[1]["settings"]


def test_a_finished_run_is_extended_without_measuring_anything_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    measure = separation.measure

    def counting(point: Any, shop: Any) -> Any:
        measured.append(point.name)
        return measure(point, shop)

    monkeypatch.setattr(separation, "measure", counting)
    go(tmp_path / "a", **SMALL)
    first = measured.copy()
    go(tmp_path / "a", resume=True, **SMALL)
    assert measured == first
    go(tmp_path / "a", resume=True, **{**SMALL, "kernels": "exp,linear,elu1"})
    assert measured[len(first) :] == ["separation/base/elu1", "separation/m/elu1"]
    go(tmp_path / "b", **{**SMALL, "kernels": "exp,linear,elu1"})
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_other_settings_measure_anew(tmp_path: Path) -> None:
    go(tmp_path / "a", **SMALL)
    go(tmp_path / "a", resume=True, **{**SMALL, "trials": 41})
    assert {row["point"]["trials"] for row in rows(tmp_path / "a")} == {41}


def test_runs_are_merged_into_one_report(tmp_path: Path) -> None:
    go(tmp_path / "a", **SMALL)
    go(tmp_path / "b", **{**SMALL, "kernels": "elu1,exp"})
    go(tmp_path / "whole", **{**SMALL, "kernels": "exp,linear,elu1"})
    summary, code, _, _ = go(tmp_path / "both", str(tmp_path / "a"), str(tmp_path / "b"), merge=True)
    assert code == 0 and summary["studies"]["separation"].keys() == {"exp", "linear", "elu1"}
    found = sorted(rows(tmp_path / "both"), key=json.dumps)
    assert found == sorted(rows(tmp_path / "whole"), key=json.dumps)


def test_a_dry_run_of_a_merge_writes_nothing(tmp_path: Path) -> None:
    go(tmp_path / "a", **SMALL)
    summary, code, _, _ = go(tmp_path / "both", str(tmp_path / "a"), merge=True, dry_run=True)
    assert code == 0 and summary["points"] == {"separation": 6} and not (tmp_path / "both").exists()


def test_runs_at_odds_are_not_merged(tmp_path: Path) -> None:
    go(tmp_path / "a", **SMALL)
    text = (tmp_path / "a/results.jsonl").read_text()
    go(tmp_path / "b", **SMALL)
    (tmp_path / "b/results.jsonl").write_text(text.replace('"success":', '"succes":'))
    with pytest.raises(MissingError, match="not what the run wrote"):
        go(tmp_path / "both", str(tmp_path / "a"), str(tmp_path / "b"), merge=True)
    with pytest.raises(MissingError, match="no such run"):
        go(tmp_path / "both", str(tmp_path / "c"), merge=True)
    with pytest.raises(UsageError, match="--merge needs"):
        go(tmp_path / "both", merge=True)
    assert not (tmp_path / "both").exists()


def test_a_plan_says_how_much_there_is_to_do_and_does_nothing(tmp_path: Path) -> None:
    summary, code, _, _ = go(tmp_path / "a", dry_run=True, **SMALL)
    assert summary["points"] == {"separation": 4} and code == 0 and not list(tmp_path.iterdir())


def test_the_registry_is_printed_as_records() -> None:
    summary, _, _, emitted = go(None, list_kernels=True)
    assert summary == {} and [row["kernel"] for row in emitted] == [kernel.name for kernel in registered()]
    assert all(row["formula"] and row["reference"] for row in emitted)
    assert next(row for row in emitted if row["kernel"] == "taylor2")["features"] == 2145


@pytest.mark.parametrize(
    ("given", "inputs", "message"),
    [
        ({}, (), "--study is missing"),
        ({"study": ("speed", "sepration")}, (), "--study sepration"),
        ({"study": ("separation",)}, ("text.txt",), "unexpected argument text.txt"),
        ({"study": ("separation",), "jobs": 0}, (), "--jobs is 0"),
        ({"study": ("separation",), "limit": 3}, (), "--limit"),
        ({"study": ("separation",), "kernels": "nope"}, (), "no such kernel"),
        ({"study": ("separation",), "kernels": ""}, (), "--kernels names no kernel"),
        ({"study": ("separation",), "merge": True}, ("a",), "--merge and --study exclude each other"),
        ({"list_kernels": True}, ("a",), "unexpected argument a"),
        ({"study": ("speed",), "dry_run": True, "device": "nope"}, (), "--device nope"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, given: dict[str, Any], inputs: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        go(tmp_path / "a", *inputs, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kernels", ["pow:1000", "euler:16", "pow:99998"])
def test_features_beyond_64_bits_are_told_in_floats_or_not_at_all(tmp_path: Path, kernels: str) -> None:
    for study, more in (
        ("fidelity", {"synthetic": 1.0, "tokens": 16}),
        ("recall", {"pairs": "2", "steps": 2, "seeds": 1, "vocabulary": 16, "feature_dim": 64}),
        ("speed", {"lengths": "4", "passes": "fwd", "impls": "chunked", "dim": "128"}),
    ):
        _, code, _, _ = go(tmp_path / study, study=(study,), kernels=kernels, **more)
        assert code == (3 if study == "speed" else 0)
        (values,) = [row["values"] for row in rows(tmp_path / study) if row["kernel"] == kernels][:1]
        if study == "fidelity":
            size = values["state_bytes"]
            expected = {"pow:1000": comb(1063, 1000) * 260, "euler:16": comb(80, 16) * 260, "pow:99998": None}[kernels]
            assert size is None if expected is None else size == pytest.approx(float(expected), rel=1e-15)


def test_what_is_shared_lies_beside_the_run_and_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".a.scratch/of a run that was killed").mkdir(parents=True)
    seen: list[list[Path]] = []
    measure = separation.measure

    def looking(point: Any, shop: Any) -> Any:
        seen.append([shop.scratch.parent, *shop.scratch.parent.iterdir()])
        return measure(point, shop)

    monkeypatch.setattr(separation, "measure", looking)
    go(tmp_path / "a", **SMALL)
    assert seen[0] == [tmp_path / ".a.scratch", tmp_path / ".a.scratch/separation"]
    assert not (tmp_path / ".a.scratch").exists()


@pytest.mark.parametrize(
    ("was", "now"), [(b'"rows":[', b'"rows":[7,'), (b'"rows"', b'"rowz"'), (b'"status":"done"', b'"status":"nope"')]
)
def test_a_journal_whose_entries_are_no_rows_is_refused(tmp_path: Path, was: bytes, now: bytes) -> None:
    go(tmp_path / "a", **SMALL)
    journal = (tmp_path / "a/journal.jsonl").read_bytes()
    (tmp_path / "b.journal").write_bytes(journal.replace(was, now, 1))
    with pytest.raises(MissingError, match=r"b\.journal: an entry holds no results"):
        go(tmp_path / "b", resume=True, **SMALL)


def test_studies_run_in_the_order_of_the_paper_however_they_are_named() -> None:
    assert run.names(Config(study=("speed", "separation", "speed"))) == ["separation", "speed"]
    assert run.names(Config(study=("all",))) == ["separation", "fidelity", "recall", "speed"]


def outcome(status: str) -> Any:
    def measure(point: Any, shop: Any) -> list[dict[str, Any]]:
        row = {"study": "separation", "kernel": point.settings["kernel"], "status": status, "reason": "because"}
        return [{**row, "point": {"part": "base", "n": 1000, "d": 102, "m": 1, "a0": 0.1, "a1": 1.0, "b": 0.1, "c": 0.9,
                 "trials": 40, "seed": 0, "provenance": "recalled", "variant": "self"}, "values": {}}]  # fmt: skip

    return measure


def test_a_result_that_failed_fails_the_command_once_all_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(separation, "measure", outcome("failed"))
    _, _, work, _ = go(tmp_path / "a", **{**SMALL, "sweep": ()})
    assert isinstance(work.failure, CheckFailed) and "because" in work.failure.message
    assert (tmp_path / "a/report.md").is_file()


def test_a_run_that_skipped_everything_is_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separation, "measure", outcome("skipped"))
    _, code, work, _ = go(tmp_path / "a", **SMALL)
    assert code == 3 and work.failure is None


def test_a_kernel_is_added_by_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cube = Kernel(
        "quintic", "(s/5 + 1)^5 where positive", "this test", positive=True, monotone=True, injective=False,
        features=lambda d: None, weight=lambda s: (1 + s / 5).clamp_min(0) ** 5,
    )  # fmt: skip
    monkeypatch.setattr(kernels, "_FAMILIES", {**kernels._FAMILIES, "quintic": kernels._one(cube)})
    assert "quintic" in [row["kernel"] for row in go(None, list_kernels=True)[3]]
    for study, more in (
        ("separation", {"sweep": ("m=1,4",), "trials": 40}),
        ("fidelity", {"synthetic": 1.0, "tokens": 32}),
        ("recall", {"pairs": "2", "steps": 2, "seeds": 1, "vocabulary": 16}),
    ):
        summary, _, _, _ = go(tmp_path / study, study=(study,), kernels="quintic", **more)
        assert "quintic" in summary["studies"][study], study


def test_damaged_rows_are_told_by_line(tmp_path: Path) -> None:
    from pomona.methods.attn_compare.results import read_rows

    with pytest.raises(DataError, match="line 2"):
        read_rows(b'{"study": "speed", "kernel": "exp", "point": {}, "status": "done"}\n{}\n')
