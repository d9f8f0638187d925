"""Outputs that are either absent, what they were, or complete.

A file is written under a temporary name beside its destination, flushed to the disk, renamed over it, and the folder
is flushed too. The temporary name is fixed (``.NAME.partial``), so what a killed run leaves behind is swept by the
next one; a lock makes a second run on the same output fail at once instead of mixing the two.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pomona.errors import OutputError

_REFUSALS = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the size limit",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EISDIR: "it is a directory",
    errno.ENOTDIR: "a parent is not a directory",
    errno.ENOENT: "the folder does not exist",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EIO: "input/output error",
}


def refusal(error: OSError, path: Path | str) -> OutputError:
    """`error` met while writing `path`, as the one line a user should read."""
    reason = _REFUSALS.get(error.errno or 0, error.strerror or str(error))
    return OutputError(f"cannot write {path}: {reason}")


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn an `OSError` met while writing `path` into `OutputError`. A closed pipe passes: it is no failure."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise refusal(error, path) from error


def partial_path(path: Path) -> Path:
    """The temporary sibling that `path` is written under."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path`, whole, when the block ends well; otherwise `path` is untouched."""
    partial = partial_path(path)
    try:
        with writing(path):
            file = partial.open("wb")
        try:
            yield file
            with writing(path):
                file.flush()
                os.fsync(file.fileno())
        finally:
            with contextlib.suppress(OSError):  # it tries once more to write what could not be written
                file.close()
        with writing(path):
            publish(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that appears at `path` when the block ends well. An existing `path` is replaced whole."""
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(path):
            partial.mkdir(parents=True)
        yield partial
        with writing(path):
            for file in sorted(p for p in partial.rglob("*") if p.is_file()):
                sync(file)
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            if path.is_dir():
                path.rename(old)
            try:
                publish(partial, path)
            except OSError:
                if old.is_dir() and not path.exists():
                    old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def publish(partial: Path, path: Path) -> None:
    """Rename `partial` over `path` and flush the folder, the step that makes an output exist."""
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the right to write `path`. The lock is the kernel's, so it ends with the process that holds it.

    Raises:
        OutputError: another process holds it; the message names that process.
    """
    from filelock import FileLock, Timeout

    lock_path = path.with_name(f".{path.name}.lock")
    lock = FileLock(lock_path, timeout=0)
    with writing(path):
        path.parent.stat()  # the lock would create missing folders
        try:
            lock.acquire()
        except Timeout:
            with contextlib.suppress(OSError):
                holder = lock_path.with_suffix(".pid").read_text().strip()
                raise OutputError(f"{path} is being written by process {holder}") from None
            raise OutputError(f"{path} is being written by another process") from None
    owner = lock_path.with_suffix(".pid")
    try:
        with writing(path):
            owner.write_text(f"{os.getpid()}\n")
        yield
    finally:
        for left in (owner, lock_path):
            with contextlib.suppress(OSError):
                left.unlink()
        lock.release()
