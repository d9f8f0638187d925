"""The run record beside an output: what was run on what, and what came of it.

``OUT.manifest.json`` is written last, so an output with a manifest is complete. What cannot be reproduced (times,
machine, versions of libraries) stands apart under ``volatile``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pomona import __version__
from pomona.io.atomic import atomic_file

_CREDENTIALS = re.compile(r"://[^/@\s]*@")
_DIRECTORY_FIELDS = {"pomona", "command", "settings", "inputs", "files", "results"}
_LIBRARIES = (
    *("accelerate", "datasets", "diffusers", "numpy", "openai", "orjson", "pillow", "pyarrow", "scikit-learn"),
    *("torch", "transformers"),
)


def manifest_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.manifest.json")


def plain(value: Any) -> Any:
    """`value` as JSON would give it back: dataclasses become objects, paths text, tuples lists.

    A user name and password inside an address are left out, as secrets never reach a manifest.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, str):
        return _CREDENTIALS.sub("://", value)
    return str(value) if isinstance(value, Path) else value


def changed(options: Any) -> dict[str, str]:
    """The fields of a dataclass of options that are not what they are by default, as text under their flags' names."""
    told = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            told[field.name.replace("_", "-")] = str(plain(shown))
    return told


def file_digest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256}


def versions() -> dict[str, str]:
    """Installed versions of the libraries that results depend on, without importing them."""
    from importlib import metadata  # a tenth of the start-up time of --help

    found = {"python": platform.python_version(), "pomona": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_manifest(
    output: Path,
    *,
    command: str,
    settings: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    started: float,
    beside: Sequence[Path] = (),
    measured: Mapping[str, Any] | None = None,
) -> None:
    """Write the manifest of `output`, which must already be in place.

    Args:
        beside: files that belong to `output`, in place too.
        measured: what another run would not measure alike; it stands apart.
    """
    entry = {
        **_described(command, settings, inputs),
        "output": {"name": output.name, **file_digest(output)},
        **({"beside": {path.name: file_digest(path) for path in beside}} if beside else {}),
        "results": plain(results),
        "volatile": _volatile(started) | ({"measured": plain(measured)} if measured else {}),
    }
    with atomic_file(manifest_path(output)) as file:
        file.write(_encoded(entry))


def directory_manifest(
    folder: Path,
    *,
    command: str,
    settings: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    measured: Mapping[str, Any],
    started: float,
) -> bytes:
    """The manifest of a directory whose files are all in `folder`, which is not yet under its own name.

    Args:
        measured: what another run would not measure alike; it stands apart.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return _encoded(
        {
            **_described(command, settings, inputs),
            "files": {path.relative_to(folder).as_posix(): file_digest(path) for path in files},
            "results": plain(results),
            "volatile": _volatile(started) | ({"measured": plain(measured)} if measured else {}),
        }
    )


def _described(command: str, settings: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "pomona": __version__,
        "command": command,
        "state": "complete",
        "settings": plain(settings),
        "inputs": list(inputs),
    }


def _volatile(started: float) -> dict[str, Any]:
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 3),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "executable": Path(sys.argv[0]).name,
    }


def _encoded(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, indent=2, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"


def read_manifest(output: Path) -> dict[str, Any] | None:
    """The manifest of the file `output`, or None when there is none that can be read."""
    return _read(manifest_path(output))


def read_directory_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest inside `folder`, or None when there is none of ours that can be read."""
    entry = _read(folder / "manifest.json")
    return entry if entry is not None and entry.keys() >= _DIRECTORY_FIELDS else None  # others have files of that name


def _read(path: Path) -> dict[str, Any] | None:
    try:
        entry = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
