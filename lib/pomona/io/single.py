"""The life of a command that writes one file.

A `RunFile` is a transient run whose output is a file, with or without files beside it that belong to it
(``features.npy.json`` to ``features.npy``), and whose manifest is ``NAME.manifest.json``. The manifest is written last:
an output without it is not finished.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pomona.errors import OutputError
from pomona.io.atomic import partial_path, sync, writing
from pomona.io.atomic import publish as put
from pomona.io.directory import RunDirectory
from pomona.io.manifest import manifest_path, read_manifest, write_manifest

_FIELDS = {"pomona", "command", "settings", "inputs", "output", "results"}


class RunFile(RunDirectory):
    """A `RunDirectory` whose output is the file `path`; see the module."""

    transient = True

    def _refuse(self, path: Path) -> None:
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a directory")
        if not path.exists() or self.settings.overwrite:
            return
        if not self.settings.resume:
            raise OutputError(f"{path} exists", hint="--overwrite replaces it, --resume continues an interrupted run")
        if self._manifest(path) is None and not self.journal_path.exists():
            raise OutputError(f"{path} is no output of a run that can be resumed", hint="--overwrite replaces it")

    def _manifest(self, path: Path) -> dict[str, Any] | None:
        entry = read_manifest(path) if path.exists() else None
        if entry is None or not entry.keys() >= _FIELDS or not isinstance(entry["output"], dict):
            return None
        beside = entry.setdefault("beside", {})
        return entry if isinstance(beside, dict) and all(_beside(name, path) for name in beside) else None

    def _files(self, path: Path, entry: Mapping[str, Any]) -> dict[Path, Mapping[str, Any]]:
        own = {name: was for name, was in entry["output"].items() if name != "name"}
        return {path: own, **{path.with_name(name): was for name, was in entry["beside"].items()}}

    @contextlib.contextmanager
    def publish(self, sources: Sequence[Mapping[str, Any]], results: Callable[[], Mapping[str, Any]]) -> Iterator[Path]:
        """A folder to fill with a file of the name of `path`, and with files called ``NAME.*`` that belong to it.

        When the block ends well they go to their place, the file itself last, and then the manifest is written. A file
        that is replaced and has others beside it goes first, so that old and new never stand side by side.
        """
        assert self.path is not None
        path, partial = self.path, partial_path(self.path)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with writing(path):
                partial.mkdir()
            yield partial
            beside = _filled(partial, path)
            before = self._manifest(path)
            old = [path.with_name(name) for name in before["beside"]] if before is not None else []
            with writing(path):
                for file in [*beside, path]:
                    sync(partial / file.name)
                manifest_path(path).unlink(missing_ok=True)  # it describes the output that is replaced now
                for stale in [path, *old] if beside or old else []:
                    stale.unlink(missing_ok=True)
                for file in [*beside, path]:
                    put(partial / file.name, file)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        write_manifest(
            path,
            command=self.command,
            settings=self.described,
            inputs=sources,
            results=results(),
            started=self._started,
            beside=beside,
            measured=self.measured,
        )
        self._let_go()


def _filled(folder: Path, path: Path) -> list[Path]:
    """Where the files in `folder` go that belong beside `path`."""
    names = sorted(file.name for file in folder.iterdir())
    others = [name for name in names if name != path.name]
    if path.name not in names or not all(_beside(name, path) for name in others):
        raise ValueError(f"{names} are not {path.name} and files that belong to it")
    return [path.with_name(name) for name in others]


def _beside(name: str, path: Path) -> bool:
    """Whether a file called `name` can belong to the output `path`."""
    own = name.startswith(f"{path.name}.") and Path(name).name == name
    return own and name not in (manifest_path(path).name, f"{path.name}.journal", f"{path.name}.shards")
