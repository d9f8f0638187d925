"""The small commands beside the ten: lists of what there is, as JSONL for programs and as text on a terminal."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson
import typer


@dataclasses.dataclass(frozen=True)
class ListCommand:
    """A command without a method: `rows` gives flat objects, the first value of each being its title."""

    name: str
    help: str
    rows: Callable[[], Iterable[Mapping[str, Any]]]
    panel: str = "Toolkit"

    def register(self, app: typer.Typer) -> None:
        """Add this command to `app`."""
        app.command(self.name, rich_help_panel=self.panel, help=self.help)(self.main)

    def main(self) -> None:
        """The body Typer calls."""
        for row in self.rows():
            if sys.stdout.isatty():
                typer.echo(as_text(row))
            else:
                typer.echo(orjson.dumps(dict(row)).decode("utf-8"))


def as_text(row: Mapping[str, Any]) -> str:
    """One row for people."""
    title, *rest = row.items()
    width = max((len(key) for key, _ in rest), default=0)
    lines = [str(title[1])]
    for key, value in rest:
        for number, part in enumerate(value if isinstance(value, list) else [value]):
            label = key if number == 0 else ""
            lines.append(
                textwrap.fill(
                    str(part), 100, initial_indent=f"  {label:<{width}}  ", subsequent_indent=" " * (width + 4)
                )
            )
    return "\n".join(lines) + "\n"
