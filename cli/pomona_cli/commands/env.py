"""``pomona env``."""

from __future__ import annotations

from collections.abc import Iterator

from pomona_cli.toolkit import ListCommand


def rows() -> Iterator[dict[str, object]]:
    """Versions of what results depend on, and the devices that work can run on."""
    from pomona.io.manifest import versions
    from pomona.runtime.device import describe

    for name, version in versions().items():
        yield {"name": name, "version": version}
    yield from describe()


COMMAND = ListCommand(name="env", help="Versions and devices, for bug reports.", rows=rows)
