"""``pomona models``."""

from __future__ import annotations

from collections.abc import Iterator

from pomona_cli.toolkit import ListCommand


def rows() -> Iterator[dict[str, object]]:
    """The embedded models, and where they are on this machine."""
    from pomona.models.embedded import describe

    yield from describe()


COMMAND = ListCommand(name="models", help="The embedded models and where they are.", rows=rows)
