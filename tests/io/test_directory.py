"""What a run directory keeps of a run, apart from what the contract tests show of every command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pomona.io.directory import RunDirectory
from pomona.runtime.progress import Quiet
from pomona.runtime.settings import Settings


def _publish(path: Path, measured: Mapping[str, Any], *, resume: bool = False) -> dict[str, Any] | None:
    work = RunDirectory(
        "test", (), Settings(output=path, resume=resume), described={"a": 1}, progress=Quiet(), emit=lambda record: None
    )
    with work:
        if (finished := work.finished_before([])) is not None:
            return {**finished, **work.measured}
        work.measured.update(measured)
        with work.publish([], lambda: {"kept": 2}) as folder:
            (folder / "x").write_text("x")
    return None


def test_what_a_run_measured_stands_apart_and_is_found_again(tmp_path: Path) -> None:
    _publish(tmp_path / "a", {"peak_rss_mb": 300})
    _publish(tmp_path / "b", {"peak_rss_mb": 301})
    assert _publish(tmp_path / "a", {}, resume=True) == {"kept": 2, "peak_rss_mb": 300}
    first, second = (json.loads((tmp_path / name / "manifest.json").read_bytes()) for name in "ab")
    assert first.pop("volatile")["measured"] == {"peak_rss_mb": 300} and second.pop("volatile")
    assert first == second


def test_a_manifest_without_what_was_measured_is_still_one(tmp_path: Path) -> None:
    _publish(tmp_path / "a", {})
    manifest = json.loads((tmp_path / "a/manifest.json").read_bytes())
    assert "measured" not in manifest["volatile"]
    for volatile in (None, [], "x"):
        (tmp_path / "a/manifest.json").write_text(json.dumps({**manifest, "volatile": volatile}))
        assert _publish(tmp_path / "a", {}, resume=True) == {"kept": 2}
