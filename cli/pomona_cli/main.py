"""The root of the command line, and the one seam between Python and the shell.

Every way a command can end passes through `seam`: success, a closed pipe (quiet, exit 0), a signal (clean up, then die
by that signal, so that a shell loop stops), an expected failure (one line, its exit code), a full disk, and a bug.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from pomona import __version__
from pomona.errors import PomonaError, UsageError
from pomona.io.atomic import refusal
from pomona_cli import commands
from pomona_cli.options import Face
from pomona_cli.output import report_error

_PANELS = ("Select", "Merge", "Raise", "Measure", "Toolkit")


class Interrupted(BaseException):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


_received: list[int] = []
_CLEANING_UP_S = 5.0
_LATER_S = 0.05


def _interrupt(number: int, frame: FrameType | None) -> None:
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False):  # an exception that lands in its C++ aborts the process: come back later
        again = threading.Timer(_LATER_S, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        return
    signal.signal(number, signal.SIG_DFL)  # a second one skips the cleaning up
    _received.append(number)
    # The exception can be swallowed where it lands (an import, a destructor, a callback). The signal must not be.
    last = threading.Timer(_CLEANING_UP_S, os.kill, (os.getpid(), number))
    last.daemon = True
    last.start()
    raise Interrupted(number)


def _die_by(number: int) -> NoReturn:
    """End as the signal would have ended us, which is how a shell tells Ctrl-C from a failed command."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


@contextlib.contextmanager
def seam(command: str) -> Iterator[None]:
    """Turn whatever ends the block into what a shell expects."""
    face = Face(debug="--debug" in sys.argv)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads any more. What is still in a buffer must not fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(0) if sys.stdout.closed else sys.exit(0)
    except Interrupted as stop:
        _die_by(stop.number)
    except KeyboardInterrupt:
        _die_by(signal.SIGINT)
    except PomonaError as error:
        _fail(command, error, face)
    except OSError as error:
        _fail(command, refusal(error, error.filename or "standard output"), face)
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of Typer's own making
            _fail(command, UsageError(error.format_message(), hint=f"{command} --help lists the options"), face)
        if face.debug:
            raise
        bug = PomonaError(
            f"internal error: {type(error).__name__}: {error}", hint="--debug shows where; please report it"
        )
        _fail(command, bug, face)


def _fail(command: str, error: PomonaError, face: Face) -> NoReturn:
    if _received:  # what failed is what the signal interrupted
        _die_by(_received[0])
    if face.debug:
        traceback.print_exc(file=sys.stderr)
    report_error(command, error, face)
    _leave(error.exit_code)


def _leave(code: int) -> NoReturn:
    """Exit with `code` even if a dead standard output still holds bytes that cannot be flushed."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.exit(code)
    os._exit(code)


class Root(TyperGroup):
    """The root group with the seam built in. It must be inside Typer, which swallows closed pipes and Ctrl-C."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        with seam("pomona"):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        name = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        with seam(f"pomona {name}".strip() if name in self.commands else "pomona"):
            return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pomona {__version__}")
        raise typer.Exit


def build_app() -> typer.Typer:
    """The root app with every command found in `pomona_cli.commands`."""
    app = typer.Typer(
        cls=Root,
        no_args_is_help=True,
        rich_markup_mode="rich" if sys.stdout.isatty() else None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Ten published machine-learning methods: choose what to learn, graft what was learned, raise a learner, "
        "measure it.",
        epilog="Exit codes: 0 done, 1 bug, 2 usage, 3 done but some records rejected or unanswered, 4 bad data, "
        "5 missing input, "
        "6 output refused, 7 device or package unavailable, 8 endpoint failed, 9 check failed.",
    )

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", help="Print the version.", callback=_version, is_eager=True),
    ) -> None:
        """Ten published machine-learning methods."""

    found = [
        importlib.import_module(f"{commands.__name__}.{module.name}").COMMAND
        for module in pkgutil.iter_modules(commands.__path__)
    ]
    for command in sorted(found, key=lambda c: (_PANELS.index(c.panel), c.name)):
        command.register(app)
    return app


def main() -> None:
    """Entry point of ``pomona`` and of ``python -m pomona_cli``."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: the next file to be opened would take its number
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w"))  # noqa: SIM115
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background job is not to hear Ctrl-C
            signal.signal(number, _interrupt)
    if "--debug" not in sys.argv:
        hush()
    try:
        build_app()(prog_name="pomona")
    except SystemExit as end:
        _end_in_a_launch(end)
        raise
    finally:
        _forget_a_dead_standard_error()


def _forget_a_dead_standard_error() -> None:
    """What could not be said must not be tried again when the interpreter ends, which would make the exit code 120."""
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def hush() -> None:
    """Keep warnings and progress of other packages from standard error; they look when they are imported."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _end_in_a_launch(end: SystemExit) -> None:
    """One of several processes ends without unloading: threads that torch leaves behind can abort it in that."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized() or not isinstance(end.code, int | None):
        return
    distributed.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(end.code or 0)
