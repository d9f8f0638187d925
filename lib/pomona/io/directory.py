"""The life of a command that writes a directory.

A `RunDirectory` holds the lock, the journal of finished work beside the directory, and the moment at which the
directory appears, whole, with its manifest. A run that was killed leaves only its journal; the same command with
``--resume`` goes on from there. A finished directory holds its journal too, so that a later run can build on it,
unless the run is transient: then journal and shards go when the directory is there.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pomona.errors import MissingError, OutputError, PomonaError, UsageError
from pomona.io.atomic import atomic_directory, atomic_file, locked, writing
from pomona.io.journal import Journal, NoJournal, holds_work, refuse_existing
from pomona.io.manifest import directory_manifest, file_digest, plain, read_directory_manifest
from pomona.io.shards import discard
from pomona.runtime.progress import Progress
from pomona.runtime.settings import Settings

JOURNAL = "journal.jsonl"


class RunDirectory:
    """Inputs, output directory and accounting of one run; a context manager.

    Attributes:
        path: the directory, None when nothing is written.
        emit: writes one record to standard output, for the modes of a command that give records.
        private: the journal stays beside the directory, which is to be shown to others.
        transient: journal and shards go once the output is there, which holds all that they do.
        measured: what no run can repeat, such as times and memory; the manifest sets it apart.
        described: everything that decides the output, for the manifest.
        failure: what the command is to fail with once all else is done.
    """

    transient = False

    def __init__(
        self,
        command: str,
        inputs: tuple[str, ...],
        settings: Settings,
        *,
        described: Mapping[str, Any],
        progress: Progress,
        emit: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.command = command
        self.inputs = inputs
        self.settings = settings
        self.progress = progress
        self.emit = emit
        self.path = self._place = written_through(settings.output)
        self.described = plain(described)
        self.journal: Journal | NoJournal = NoJournal()
        self.failure: PomonaError | None = None
        self.private = False
        self.measured: dict[str, Any] = {}
        self._locks = contextlib.ExitStack()
        self._started = time.time()

    def __enter__(self) -> RunDirectory:
        if self.path is None or self.settings.dry_run:
            return self
        self._refuse(self.path)
        with writing(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._locks.enter_context(locked(self.path))
        if not (self.settings.resume or self.settings.overwrite):
            try:
                refuse_existing(self.journal_path)
            except BaseException:
                self._locks.close()
                raise
        return self

    def _refuse(self, path: Path) -> None:
        """Raise what speaks against an output at `path`."""
        if str(path) == "-":
            raise UsageError("-o - : this command writes a directory, not a stream")
        if path.exists() and not path.is_dir():
            raise OutputError(f"cannot write {path}: it is not a directory")
        if path.is_dir() and not (self.settings.overwrite or self.settings.resume):
            raise OutputError(f"{path} exists", hint="--overwrite replaces it, --resume builds on it")
        if path.is_dir() and any(path.iterdir()) and read_directory_manifest(path) is None:
            raise OutputError(
                f"{path} is not a directory that this program wrote", hint="give the name of a new directory"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        did_nothing = not len(self.journal)
        self.journal.close(remove=did_nothing)  # and leaves nothing
        if did_nothing and self.transient and isinstance(self.journal, Journal):
            discard(self.kept)
        self._locks.close()

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.time() - self._started

    def fail_afterwards(self, error: PomonaError) -> None:
        """Let the command finish, with its output and its summary, and then fail with `error`."""
        self.failure = error

    @property
    def journal_path(self) -> Path:
        """Where finished work is kept until the directory is there."""
        return self._beside("journal")

    @property
    def kept(self) -> Path:
        """The folder of a transient run's shards, beside its journal and for as long."""
        return self._beside("shards")

    def _beside(self, suffix: str) -> Path:
        assert self._place is not None
        return self._place.with_name(f"{self._place.name}.{suffix}")

    def open_journal(self, fingerprint: Mapping[str, Any]) -> None:
        """Open the journal, once what decides its entries is known; a finished directory's is continued.

        A transient run that writes no output has its journal and its shards in a temporary folder.

        Raises:
            OutputError: the folder of shards holds files of somebody else.
            UsageError: an earlier run's journal has another fingerprint; the message names what differs.
        """
        if self.path is None and self.transient and not self.settings.dry_run:
            folder = self._locks.enter_context(tempfile.TemporaryDirectory(prefix="pomona-"))
            self._place = Path(folder) / "run"
        if self._place is None or self.settings.dry_run:
            return
        finished = self._place / JOURNAL
        if self.settings.resume and not self.journal_path.exists() and finished.is_file() and not self.transient:
            with atomic_file(self.journal_path) as copy, finished.open("rb") as source:
                shutil.copyfileobj(source, copy)
        going_on = self.settings.resume and holds_work(self.journal_path)
        if self.transient and not going_on:
            discard(self.kept)
        self.journal = Journal(self.journal_path, plain({"command": self.command, **fingerprint}), resume=going_on)
        if len(self.journal):
            self.progress.note(f"{len(self.journal)} finished pieces of work found")

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder beside the directory for what goes when the block ends; a killed run's is swept by the next."""
        assert self.path is not None
        folder = self.path.with_name(f".{self.path.name}.scratch")
        shutil.rmtree(folder, ignore_errors=True)
        with writing(folder):
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def finished_before(self, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """With --resume: the results of a finished run with the same settings on the same `sources`, if it is here.

        What it measured is then in `measured`.

        Raises:
            UsageError: other settings or other input made what a transient run would replace.
        """
        if self.path is None or not self.settings.resume or (self.journal_path.exists() and not self.private):
            return None
        entry = self._manifest(self.path)
        if entry is None:
            return None
        if entry["settings"] != self.described or entry["inputs"] != list(sources):
            if self.transient:
                raise UsageError(
                    f"{self.path} is finished, and other settings or other input made it",
                    hint="use --overwrite to replace it",
                )
            return None
        for file, was in self._files(self.path, entry).items():
            if not file.is_file() or file_digest(file) != was:
                return None
        if self.transient:
            discard(self.kept)  # a run that was killed when all was written
        volatile = entry.get("volatile")
        self.measured = volatile.get("measured", {}) if isinstance(volatile, dict) else {}
        results: dict[str, Any] = entry["results"]
        return results

    def _manifest(self, path: Path) -> dict[str, Any] | None:
        """The manifest of a finished output at `path`, if it is one."""
        return read_directory_manifest(path)

    def _files(self, path: Path, entry: Mapping[str, Any]) -> dict[Path, Mapping[str, Any]]:
        """The files that the manifest `entry` tells of, and their digests."""
        return {path / name: was for name, was in entry["files"].items()}

    @contextlib.contextmanager
    def publish(self, sources: Sequence[Mapping[str, Any]], results: Callable[[], Mapping[str, Any]]) -> Iterator[Path]:
        """A folder to fill that becomes the directory when the block ends well.

        The journal goes into it sorted by key, so that its bytes do not depend on the order in which work finished,
        and stays out of it in a private or a transient run; the manifest is written last.

        Args:
            sources: name, size and SHA-256 of each input.
            results: what the manifest is to record, asked for after the block.
        """
        assert self.path is not None
        with atomic_directory(self.path) as partial:
            yield partial
            if isinstance(self.journal, Journal) and not (self.private or self.transient):
                self.journal.write_sorted(partial / JOURNAL)
            entry = directory_manifest(
                partial,
                command=self.command,
                settings=self.described,
                inputs=sources,
                results=results(),
                measured=self.measured,
                started=self._started,
            )
            with atomic_file(partial / "manifest.json") as file:
                file.write(entry)
        self._let_go()

    def _let_go(self) -> None:
        """The output is there, so the journal, where it was not private, and the shards are not needed any more."""
        self.journal.close(remove=not self.private)
        if self.transient:
            discard(self.kept)


def written_through(output: Path | None) -> Path | None:
    """`output`, but what it leads to where it is a link, or has no name of its own."""
    return output.resolve() if output is not None and (output.is_symlink() or output.name in ("", "..")) else output


def read_results(path: Path, name: str) -> bytes:
    """The file `name` of a finished run directory.

    Raises:
        MissingError: the directory or the file is not there, or the file is not what the run wrote.
    """
    if not path.is_dir():
        raise MissingError(f"{path}: no such run directory")
    hint = "is it the output directory of a finished run?"
    try:
        content = (path / name).read_bytes()
    except OSError as error:
        raise MissingError(f"{path}: {name} is missing or unreadable", hint=hint) from error
    entry = read_directory_manifest(path)
    if entry is None:
        raise MissingError(f"{path}: manifest.json is missing or unreadable", hint=hint)
    if entry["files"].get(name) != file_digest(path / name):
        raise MissingError(f"{path}: {name} is not what the run wrote", hint="--resume of that run mends it")
    return content
