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
_LIBRARIES = ("accelerate", "datasets", "numpy", "openai", "orjson", "pyarrow", "scikit-learn", "torch", "transformers")


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
) -> None:
    """Write the manifest of `output`, which must already be in place."""
    entry = {
        "pomona": __version__,
        "command": command,
        "state": "complete",
        "settings": plain(settings),
        "inputs": list(inputs),
        "output": {"name": output.name, **file_digest(output)},
        "results": plain(results),
        "volatile": {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(time.time() - started, 3),
            "machine": f"{platform.system()} {platform.machine()}",
            "versions": versions(),
            "executable": Path(sys.argv[0]).name,
        },
    }
    with atomic_file(manifest_path(output)) as file:
        file.write(json.dumps(entry, indent=2, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")


def read_manifest(output: Path) -> dict[str, Any] | None:
    """The manifest of `output`, or None when there is none that can be read."""
    try:
        entry = json.loads(manifest_path(output).read_bytes())
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) else None
