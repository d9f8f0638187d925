"""Every byte a person or a pipe sees.

Standard output carries data and nothing else: while a command runs, file descriptor 1 points at standard error and
records go through a private duplicate, so that a stray print in any library or child process cannot corrupt a pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from pomona.errors import PomonaError
from pomona_cli.options import Face

_PLAIN_EVERY_S = 10.0


@contextlib.contextmanager
def guarded_stdout() -> Iterator[BinaryIO]:
    """The real standard output for data; everything else that writes there lands on standard error."""
    sys.stdout.flush()
    private = os.dup(1)
    os.dup2(2, 1)
    file = os.fdopen(private, "wb")
    try:
        yield file
        file.flush()
    finally:
        sys.stdout.flush()
        os.dup2(private, 1)
        with contextlib.suppress(OSError):  # a closed pipe or a full disk was reported where it was met
            file.close()


def wants_color(choice: str, stream: Any) -> bool:
    """Whether to colour `stream`: the flag wins, then NO_COLOR and TERM=dumb, then whether it is a terminal."""
    if choice != "auto":
        return choice == "always"
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and bool(stream.isatty())


def write_json(file: BinaryIO, entry: Mapping[str, Any]) -> None:
    """One JSON line for programs."""
    file.write(json.dumps(entry, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")
    file.flush()


def report_error(command: str, error: PomonaError, face: Face) -> None:
    """One line for people, and a hint."""
    red, dim, off = ("\033[1;31m", "\033[2m", "\033[0m") if wants_color(face.color, sys.stderr) else ("", "", "")
    _tell(f"{command}: {red}error:{off} {one_line(error.message)}")
    if error.hint:
        _tell(f"{dim}hint: {one_line(error.hint)}{off}")


def one_line(text: str) -> str:
    """`text` without line breaks and without control characters that could rewrite a terminal."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody is left to hear it
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class Console:
    """Progress and messages on standard error: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, command: str, face: Face) -> None:
        self._command = command
        self._face = face
        self._bar: Any = None
        self._task: Any = None
        self._label, self._done = "", 0
        self._total: int | None = None
        self._since = self._told = time.monotonic()
        self._live = not face.quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def start(self, label: str, total: int | None = None) -> None:
        self._label, self._done, self._total = label, 0, total
        self._since = self._told = time.monotonic()
        if self._live:
            if self._bar is None:
                self._bar = _rich_bar(self._face)
                self._bar.start()
            elif self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(label, total=total)

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        if self._bar is not None:
            self._bar.advance(self._task, steps)
        elif not self._face.quiet and time.monotonic() - self._told >= _PLAIN_EVERY_S:
            self._told = time.monotonic()
            rate = self._done / (self._told - self._since)
            of = f" of {self._total}" if self._total else ""
            left = f", {_duration((self._total - self._done) / rate)} left" if self._total and rate else ""
            _tell(f"{self._command}: {self._label}: {self._done}{of}, {rate:.1f}/s{left}")

    def note(self, message: str) -> None:
        if self._face.verbose:
            self._line(f"{self._command}: {one_line(message)}")

    def warn(self, message: str) -> None:
        if not self._face.quiet:
            self._line(f"{self._command}: warning: {one_line(message)}")

    def show(self, lines: str) -> None:
        if not self._face.quiet:
            self._line(lines)

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            _tell(text)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _rich_bar(face: Face) -> Any:
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Any:
            return f"{task.speed:.1f}/s" if task.speed else ""

    color = wants_color(face.color, sys.stderr)
    console = RichConsole(file=sys.stderr, no_color=not color, force_terminal=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def summary_line(entry: Mapping[str, Any]) -> str:
    """The accounting of a run in words."""
    parts = [f"{entry['in']} in", f"{entry['out']} out"]
    for key in ("filtered", "rejected"):
        if entry.get(key):
            reasons = ", ".join(f"{n} {reason}" for reason, n in entry.get(f"{key}_by", {}).items())
            parts.append(f"{entry[key]} {key} ({reasons})" if reasons else f"{entry[key]} {key}")
    if entry.get("unanswered"):
        parts.append(f"{entry['unanswered']} unanswered")
    return ", ".join(parts)
