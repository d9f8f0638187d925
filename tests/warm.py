"""Commands that start warm: forked from a server, one for each test process, that has imported the heavy packages.

A short command takes most of its time to start Python and to import torch. One that is forked is a process like any
other all the same: it has its own streams, folder, environment and exit status, it dies by real signals, and it runs
``python -m pomona_cli`` from its first line to the end of the interpreter. What it shares with its kind is what the
imports left behind, and the seed of hashes: where two runs are to give the same bytes, one of them belongs in a process
of its own (``cold=True``).

What packages look at while they are imported starts cold by itself: another environment (but for `READ_LATE`), and
``--debug``; so do several numerical threads, which no fork survives, and help, which imports nothing.
``POMONA_TESTS_COLD=1`` starts everything cold.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import select
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, NamedTuple

os.environ.pop("PYTHONUNBUFFERED", None)  # commands are to buffer what they write, as a user's do
SURROUNDINGS = {**os.environ, "HF_HUB_OFFLINE": "1"}
READ_LATE = ("columns", "comp_", "_pomona_complete", "openai_", "pytest_current_test", "http_proxy", "https_proxy",
             "all_proxy", "no_proxy", "kmp_", "torchinductor_")  # fmt: skip
PACKAGES = """accelerate jinja2 matplotlib.backends.backend_agg matplotlib.backends.backend_svg matplotlib.figure
    openai.resources.chat safetensors.torch scipy.stats transformers.models.auto.modeling_auto
    transformers.models.auto.tokenization_auto transformers.models.bert.modeling_bert
    transformers.models.llama.modeling_llama peft diffusers.models.unets.unet_2d""".split()


def start(words: list[str], cold: bool = False, **more: Any) -> subprocess.Popen[bytes]:
    """What `subprocess.Popen` does, for the command that `conftest.command` spelled."""
    more["env"] = more.get("env") or {**SURROUNDINGS, **os.environ}
    return (subprocess.Popen if cold or must_be_cold(words, more) else Forked)(words, **more)


def must_be_cold(words: list[str], more: dict[str, Any]) -> bool:
    changed = {name.lower() for name, _ in SURROUNDINGS.items() ^ more["env"].items()}
    return (
        sys.platform != "linux"
        or os.environ.get("POMONA_TESTS_COLD") == "1"
        or words[:3] != [sys.executable, "-m", "pomona_cli"]
        or not {"--debug", "--help", "--version"}.isdisjoint(words)
        or not more.keys() <= {"stdin", "stdout", "stderr", "cwd", "env", "start_new_session"}
        or more["env"].get("OMP_NUM_THREADS") != "1"
        or not all(name.startswith(READ_LATE) for name in changed)
    )


def run(words: list[str], stdin: bytes | None = None, timeout: float = 240, **more: Any) -> Any:
    """What `subprocess.run` does, for the command that `conftest.command` spelled."""
    pipe = subprocess.PIPE
    source = subprocess.DEVNULL if stdin is None else pipe
    with start(words, **{"stdin": source, "stdout": pipe, "stderr": pipe, **more}) as process:
        try:
            stdout, stderr = process.communicate(stdin, timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


class Forked(subprocess.Popen[bytes]):
    """A command that the server forks for us. It is not our child, so that its end is told on a line of its own."""

    def _execute_child(
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any,
        startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int, c2pread: int, c2pwrite: int,
        errread: int, errwrite: int, restore_signals: Any, gid: Any, gids: Any, uid: Any, umask: Any,
        start_new_session: bool, *_: Any,
    ) -> None:  # fmt: skip
        self._line, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        streams = [given if given >= 0 else own for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        wanted = {"args": args[3:], "cwd": os.fspath(cwd or Path.cwd()), "env": env, "session": start_new_session}
        try:
            with theirs, contextlib.suppress(ConnectionError):  # told below
                socket.send_fds(_server().requests, [json.dumps(wanted).encode()], [*streams, theirs.fileno()])
        finally:
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        self.pid = self._told("pid")
        self._child_created = True

    def _told(self, what: str) -> int:
        name, _, value = self._line.recv(100).decode().partition(" ")
        if name != what:
            complaints = _server().complaints
            complaints.seek(0)
            raise RuntimeError(f"no {what} of a command from the warm server:\n{complaints.read().decode()}")
        if what == "end":
            self._line.close()
        return int(value)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        ready = select.select([self._line], [], [], 0 if wait_flags & os.WNOHANG else None)[0]
        return (self.pid, self._told("end")) if ready else (0, 0)

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and (status := self._try_wait(os.WNOHANG))[0]:
            self._handle_exitstatus(status[1])
        return self.returncode


class _Server(NamedTuple):
    requests: socket.socket  # the server ends when we do, as this is closed then
    process: subprocess.Popen[bytes]
    complaints: IO[bytes]


@functools.cache
def _server() -> _Server:
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    complaints = tempfile.TemporaryFile()  # noqa: SIM115
    with theirs:
        words = [sys.executable, __file__, str(theirs.fileno())]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": complaints}
        process = subprocess.Popen(words, env=SURROUNDINGS, pass_fds=[theirs.fileno()], **quiet)
    atexit.register(lambda: (ours.close(), process.wait()))
    return _Server(ours, process, complaints)


_kept: dict[str, Any] = {}  # modules that were there before the fork


def _warm_up() -> None:
    """Import what commands import, as they do; two threads would be one too many for a fork."""
    sys.path.pop(0)  # the folder of tests
    atexit.register(_spare)  # first in, last out
    import pomona
    from pomona_cli import commands, main

    main.hush()
    ours = [
        *pkgutil.walk_packages(pomona.__path__, "pomona."),
        *pkgutil.iter_modules(commands.__path__, "pomona_cli.commands."),
    ]
    for name in [*(module.name for module in ours), *PACKAGES]:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(f"{threads} threads after the imports")
    _kept.update(sys.modules)
    gc.freeze()


def _spare() -> None:
    """Let the end of the interpreter, which costs more than a short command, pass over what others brought along."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_kept))
    for name in _kept.keys() - sys.builtin_module_names:
        if not name.startswith(("pomona", "__main__")):
            sys.modules.pop(name, None)
    libc = ctypes.CDLL(None)
    libc.on_exit(libc._exit, None)  # destructors of C++ too


def _serve(requests: socket.socket) -> None:
    """Fork a process for each request; returns in these processes alone, ready to be the command."""
    while True:
        wanted, given, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not wanted:
            os._exit(0)
        if not os.fork():
            break
        for number in given:
            os.close(number)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    line = socket.socket(fileno=given.pop())
    command = os.fork()
    if command:  # stay behind to tell how it ends, and keep none of its streams open
        requests.close()
        for number in given:
            os.close(number)
        _, status = os.waitpid(command, 0)
        with contextlib.suppress(ConnectionError):
            line.send(f"end {status}".encode())
        os._exit(0)
    _become(json.loads(wanted), given)
    line.send(f"pid {os.getpid()}".encode())
    line.close()
    requests.close()
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))


def _become(wanted: dict[str, Any], given: list[int]) -> None:
    """Have the streams, folder, environment and arguments, and be as random as a new process."""
    if wanted["session"]:
        os.setsid()
    os.chdir(wanted["cwd"])
    os.environ.clear()
    os.environ.update(wanted["env"])
    sys.argv = ["pomona", *wanted["args"]]
    sys.path.insert(0, str(Path.cwd()))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(given[number], number)
        old = getattr(sys, name)
        raw = io.FileIO(number, "w" if number else "r", closefd=False)
        new = io.TextIOWrapper(
            type(old.buffer)(raw), old.encoding, old.errors, line_buffering=name == "stderr" or raw.isatty()
        )
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    import numpy

    numpy.random.seed()


if __name__ == "__main__":
    _warm_up()
    _serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module("pomona_cli", run_name="__main__", alter_sys=True)
