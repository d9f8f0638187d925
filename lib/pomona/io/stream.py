"""The life of a command that takes records and gives records.

A `Stream` reads the input, writes the output, sets aside what cannot be processed, and keeps the books: records read
are records written, filtered or rejected, always. The method in the middle sees good records only.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, Literal

from pomona.errors import DataError, OutputError, UsageError
from pomona.io.atomic import atomic_file, locked, writing
from pomona.io.conversation import Fields
from pomona.io.journal import Journal, NoJournal, refuse_existing
from pomona.io.manifest import file_digest, manifest_path, plain, read_manifest, write_manifest
from pomona.io.records import MAX_RECORD_BYTES, Digest, Located, Record, Reject, is_regular, parse, read
from pomona.io.writers import Emit, Writer, dumps, open_writer
from pomona.runtime.progress import Progress
from pomona.runtime.settings import Settings

_FLUSH_EVERY_S = 0.1


@dataclass(frozen=True)
class StreamOptions:
    """Options of every command that streams records."""

    input_format: Annotated[
        Literal["auto", "jsonl", "json", "csv", "parquet"], "layout of the input; auto tells it from suffix and content"
    ] = "auto"
    instruction_field: Annotated[str, "field that holds the instruction"] = "instruction"
    input_field: Annotated[str, "field that holds the optional input"] = "input"
    output_field: Annotated[str, "field that holds the answer"] = "output"
    max_record_bytes: Annotated[int, "a longer record is rejected"] = MAX_RECORD_BYTES
    require_records: Annotated[bool, "fail (exit 4) when the input holds no record at all"] = False
    emit: Annotated[
        Emit, "layout of the output; auto goes by the suffix of -o; alpaca-json leaves out what this command adds"
    ] = "auto"
    rejects: Annotated[
        Path | None,
        "set bad records aside here, with reasons, and finish with exit 3; without it the first one stops the run",
    ] = None
    journal: Annotated[
        Path | None, "keep finished work here, so that --resume can continue; default with -o FILE: FILE.journal"
    ] = None


@dataclass
class Counts:
    """The books of a run."""

    read: int = 0
    written: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    unanswered: int = 0

    def summary(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "in": self.read,
            "out": self.written,
            "filtered": self.filtered.total(),
            "rejected": self.rejected.total(),
        }
        if self.filtered:
            entry["filtered_by"] = dict(sorted(self.filtered.items()))
        if self.rejected:
            entry["rejected_by"] = dict(sorted(self.rejected.items()))
        if self.unanswered:
            entry["unanswered"] = self.unanswered
        return entry


class Spool:
    """Records set down on disk, for methods that must see all of them before they choose."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the spool
        self._offsets = array("Q", [0])

    def append(self, record: Record) -> int:
        """Store `record`; returns its index."""
        line = dumps(record)
        with writing(tempfile.gettempdir()):
            self._file.seek(self._offsets[-1])
            self._file.write(line)
        self._offsets.append(self._offsets[-1] + len(line))
        return len(self._offsets) - 2

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        self._file.seek(self._offsets[index])
        record: Record = parse(self._file.read(self._offsets[index + 1] - self._offsets[index]))
        return record

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


class Stream:
    """Input, output and accounting of one run; a context manager.

    Leaving the block well publishes the output, then the manifest; leaving it by an exception publishes nothing and
    keeps the journal.
    """

    def __init__(
        self,
        command: str,
        inputs: tuple[str, ...],
        options: StreamOptions,
        settings: Settings,
        *,
        stdout: BinaryIO,
        progress: Progress,
        own_key: str,
        described: Mapping[str, Any],
    ) -> None:
        """
        Args:
            inputs: files, directories, ``hf:`` names or ``-``; empty means standard input.
            own_key: the one key under which this command adds to a record.
            described: everything that decides the output, for the manifest.
        """
        self.command = command
        self.inputs = inputs or ("-",)
        self.options = options
        self.settings = settings
        self.progress = progress
        self.own_key = own_key
        self.fields = Fields(options.instruction_field, options.input_field, options.output_field)
        self.counts = Counts()
        self.journal: Journal | NoJournal = NoJournal()
        self.output = None if settings.output is None or str(settings.output) == "-" else settings.output
        self.summary: dict[str, Any] = {}
        self.stopped: str | None = None
        self._described = plain(described)
        self._stdout = stdout
        self._locks = contextlib.ExitStack()
        self._files = contextlib.ExitStack()
        self._writer: Writer | None = None
        self._rejects: BinaryIO | None = None
        self._digests: list[Digest] = []
        self._also: list[Path] = []
        self._flushed = 0.0
        self._started = time.time()
        self._keep_journal = False

    # --- opening -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Stream:
        if self.inputs == ("-",) and sys.stdin.isatty():
            raise UsageError("no input: give a file, or pipe records in", hint=f"pomona {self.command} --help")
        if self.settings.resume and self.output is None and self.options.journal is None:
            raise UsageError("--resume needs -o FILE or --journal FILE: standard output cannot be resumed")
        if self.settings.dry_run:
            return self
        try:
            self._open()
        except BaseException:
            self._close(*sys.exc_info())
            raise
        return self

    def _open(self) -> None:
        targets = [path for path in (self.output, self.options.rejects) if path is not None]
        for path in targets:
            if path.is_dir():
                raise OutputError(f"cannot write {path}: it is a directory")
            if path.exists() and not (self.settings.overwrite or self.settings.resume):
                raise OutputError(
                    f"{path} exists", hint="--overwrite replaces it, --resume continues an interrupted run"
                )
            self._locks.enter_context(locked(path))
        if self.journal_path is not None and not (self.settings.resume or self.settings.overwrite):
            refuse_existing(self.journal_path)
        if self.output is None:
            self._file: BinaryIO = self._stdout
            self._writer = open_writer(self._file, "-", self.options.emit)
        else:
            self._file = self._files.enter_context(atomic_file(self.output))
            self._writer = open_writer(self._file, self.output.name, self.options.emit)
        if self.options.rejects is not None:
            self._rejects = self._files.enter_context(atomic_file(self.options.rejects))

    @property
    def journal_path(self) -> Path | None:
        """Where finished work is kept; None when there is nowhere to."""
        if self.options.journal is not None or self.output is None:
            return self.options.journal
        return self.output.with_name(f"{self.output.name}.journal")

    def open_journal(self, fingerprint: Mapping[str, Any], *, keep: bool = False) -> None:
        """Open the journal, once what decides its entries is known.

        Args:
            fingerprint: what a resumed run must agree on.
            keep: the journal outlives a finished run (it holds answers that were paid for).
        """
        self._keep_journal = keep or self.options.journal is not None
        if self.journal_path is not None and not self.settings.dry_run:
            self.journal = Journal(
                self.journal_path, plain({"command": self.command, **fingerprint}), resume=self.settings.resume
            )
            if len(self.journal):
                self.progress.note(f"{len(self.journal)} finished pieces of work found in {self.journal_path}")

    def finished_before(self) -> dict[str, Any] | None:
        """With --resume: the summary of a finished run of the same command on the same input, if there was one.

        Raises:
            UsageError: the output is finished, and other settings or other input made it.
        """
        entry = read_manifest(self.output) if self.settings.resume and self.output and self.output.exists() else None
        if entry is None or self.output is None:
            return None
        read_then = entry["inputs"]
        read_now = [*self.inputs, *(i["source"] for i in read_then[len(self.inputs) :])]
        same_input = all(map(is_regular, read_now)) and all(
            file_digest(Path(name)).items() <= was.items() for name, was in zip(read_now, read_then, strict=True)
        )
        if entry["settings"] != self._described or not same_input:
            raise UsageError(
                f"{self.output} is finished, and other settings or other input made it",
                hint="use --overwrite to replace it",
            )
        results: dict[str, Any] = entry["results"]
        if results.get("unanswered") or entry["output"]["sha256"] != file_digest(self.output)["sha256"]:
            return None
        return results

    def also_reads(self, path: Path) -> None:
        """Put a file besides the input (ratings, a prompt) into the manifest."""
        if path.is_file():
            self._also.append(path)

    # --- records -----------------------------------------------------------------------------------------------------

    def records(self) -> Iterator[Located]:
        """The good records of the input, in order, at most ``--limit`` of them counting bad ones.

        Raises:
            DataError: a bad record, unless there is a rejects file; or no record under ``--require-records``.
        """
        source = read(
            self.inputs,
            format=self.options.input_format,
            max_record_bytes=self.options.max_record_bytes,
            digests=self._digests,
        )
        while self.settings.limit is None or self.counts.read < self.settings.limit:
            item = next(source, None)
            if item is None:
                break
            self.counts.read += 1
            if isinstance(item, Reject):
                self._reject(item, {"raw": item.raw})
            else:
                yield item
        if self.options.require_records and self.counts.read == 0:
            raise DataError("the input holds no record (--require-records)")

    def emit(self, record: Record) -> None:
        """Write `record`; with ``--emit alpaca-json`` without what this command added."""
        self.counts.written += 1
        if self._writer is None:
            return
        if self.options.emit == "alpaca-json":
            record = {key: value for key, value in record.items() if key != self.own_key}
        with writing(self.output or "standard output"):
            self._writer.write(record)
            now = time.monotonic()
            if self.output is None and now - self._flushed > _FLUSH_EVERY_S:
                self._flushed = now
                self._file.flush()

    def flush(self) -> None:
        """Hand everything written so far to a reader of standard output."""
        if self.output is None and self._writer is not None:
            with writing("standard output"):
                self._file.flush()

    def filter(self, reason: str) -> None:
        """Count one record that is left out on purpose."""
        self.counts.filtered[reason] += 1

    def reject(self, located: Located, reason: str, *, fatal: bool = True, detail: str | None = None) -> None:
        """Set aside a record that could not be processed.

        Args:
            reason: a short class of reasons, counted in the summary.
            fatal: whether it is the input's fault, so that without ``--rejects`` the run stops.
            detail: more for people about this one.
        """
        entry: dict[str, Any] = {"detail": detail} if detail else {}
        entry["record"] = located.record
        self._reject(Reject(reason, located.source, located.line), entry, fatal=fatal)

    def _reject(self, what: Reject, entry: Mapping[str, Any], *, fatal: bool = True) -> None:
        if fatal and self.options.rejects is None and not self.settings.dry_run:
            raise DataError(
                f"{what.source}:{what.line}: {what.reason}", hint="--rejects FILE sets bad records aside and goes on"
            )
        self.counts.rejected[what.reason] += 1
        if self._rejects is not None:
            with writing(self.options.rejects or ""):
                line = {"reason": what.reason, "source": what.source, "line": what.line, **entry}
                self._rejects.write(dumps(line) + b"\n")

    def spool(self) -> Spool:
        """Disk-backed storage for two-pass work."""
        spool = Spool()
        self._files.callback(spool.close)
        return spool

    def incomplete(self, why: str, unanswered: int = 0) -> None:
        """The run stops before its end (a budget is used up): publish nothing, keep the journal, exit 3."""
        self.stopped = why
        self.counts.unanswered += unanswered

    # --- closing -----------------------------------------------------------------------------------------------------

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None or self.settings.dry_run:
            self._close(kind, error, trace)
            return
        try:
            self._finish()
        except BaseException:
            self._close(*sys.exc_info())
            raise
        self._close(None, None, None)

    def _close(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of everything; files that were not published yet vanish when there is an error."""
        self.journal.close()
        with self._locks:
            self._files.__exit__(kind, error, trace)

    def _finish(self) -> None:
        """Publish the output, then say so in the manifest, then let go of the journal."""
        if self.stopped is not None and self.output is not None:
            self._files.__exit__(_NotPublished, _NotPublished(), None)
            self.progress.warn(f"stopped: {self.stopped}; {self.output} was not written, --resume continues")
            return
        assert self._writer is not None
        with writing(self.output or "standard output"):
            self._writer.close()
            self._file.flush()
        if self.output is not None:
            manifest_path(self.output).unlink(missing_ok=True)  # it describes the output that is replaced now
        self._files.close()
        if self.output is not None:
            write_manifest(
                self.output,
                command=self.command,
                settings=self._described,
                inputs=[
                    *(digest.as_dict() for digest in self._digests),
                    *({"source": str(path), **file_digest(path)} for path in self._also),
                ],
                results={**self.counts.summary(), **self.summary},
                started=self._started,
            )
        self.journal.close(remove=not (self._keep_journal or self.counts.unanswered or self.stopped))


class _NotPublished(Exception):
    """Unwinds the output's context without publishing it."""
