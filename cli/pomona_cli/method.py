"""What every command of a method has in common: its options from dataclasses, its help, its configuration."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from pomona.io.manifest import plain
from pomona.runtime.settings import Settings
from pomona_cli.options import Face, build, parameters, read_config, with_parameters
from pomona_cli.output import Console, guarded_stdout, write_json

FINISHED, INCOMPLETE = 0, 3


@dataclasses.dataclass(frozen=True)
class MethodCommand:
    """What makes one command different from another.

    The method lives in ``pomona.methods.STEM``: ``config.Config`` holds its options, ``run.run`` does its work and
    ``run.serve(config, settings)`` its share of it in the other processes of a launch.
    """

    name: str
    panel: str
    config: type[Any]
    help: str
    examples: tuple[str, ...]
    inputs_help: str

    @property
    def stem(self) -> str:
        return self.name.replace("-", "_")

    @property
    def owners(self) -> dict[str, type[Any]]:
        """The dataclasses whose fields are options, under the panel of the help that shows them."""
        return {"Method": self.config, "Run": Settings}

    def register(self, app: typer.Typer) -> None:
        """Add this command to `app`."""
        argument = typer.Argument(help=self.inputs_help, metavar="INPUT", show_default=False)
        inputs = inspect.Parameter(
            "inputs", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[list[str] | None, argument]
        )
        made = [inputs]
        for panel, owner in self.owners.items():
            made += parameters(owner, panel)
        made += parameters(Face, "Help and messages")
        app.command(self.name, rich_help_panel=self.panel, help=self._help())(with_parameters(self.main, made))

    def _help(self) -> str:
        """Paragraphs on one line each, for the terminal to wrap, then an example a paragraph."""
        paragraphs = [" ".join(paragraph.split()) for paragraph in self.help.split("\n\n")]
        return "\n\n".join([*paragraphs, "Examples:", *(f"$ {example}" for example in self.examples)])

    def main(self, inputs: list[str] | None, **given: Any) -> None:
        """The body Typer calls."""
        face = build(Face, given, {})
        file = read_config(face.config, [f.name for owner in self.owners.values() for f in dataclasses.fields(owner)])
        options = {panel: build(owner, given, file) for panel, owner in self.owners.items()}
        with guarded_stdout() as stdout:
            if face.dump_config:
                write_json(stdout, {k: v for part in options.values() for k, v in plain(part).items()})
                return
            method = importlib.import_module(f"pomona.methods.{self.stem}.run")
            if os.environ.get("RANK", "0").strip() not in ("", "0"):
                method.serve(options["Method"], options["Run"])
                return
            console = Console(f"pomona {self.name}", face)
            try:
                code = self.work(method, tuple(inputs or ()), options, stdout, console)
            finally:
                console.close()
        if code != FINISHED:
            raise typer.Exit(code)

    def described(self, config: Any, settings: Settings) -> dict[str, Any]:
        """Everything that decides the output, for the manifest."""
        names = ("model", "dtype", "seed", "limit", "batch_size")
        return {"config": config, **{name: getattr(settings, name) for name in names}}

    def work(
        self, method: Any, inputs: tuple[str, ...], options: Mapping[str, Any], stdout: Any, console: Console
    ) -> int:
        """Do the command's work; returns the exit code."""
        raise NotImplementedError
