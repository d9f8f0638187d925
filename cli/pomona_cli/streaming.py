"""A command that takes records and gives records: everything but its method."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from typing import Annotated, Any

import typer

from pomona.io.manifest import plain
from pomona.io.stream import Stream, StreamOptions
from pomona.runtime.settings import Settings
from pomona_cli.options import Face, build, parameters, read_config, with_parameters
from pomona_cli.output import Console, guarded_stdout, summary_line, write_json

_INPUT_HELP = "Files, saved dataset directories or hf:NAME[:SPLIT]; - or nothing is standard input."
_FINISHED, _INCOMPLETE = 0, 3


@dataclasses.dataclass(frozen=True)
class StreamCommand:
    """What makes one stream command different from another.

    The method lives in ``pomona.methods.STEM``: ``config.Config`` holds its options and ``run.run(config, settings,
    stream)`` does its work, or ``run.serve(config, settings)`` its share of it in the other processes of a launch.
    """

    name: str
    panel: str
    config: type[Any]
    own_key: str
    help: str
    examples: tuple[str, ...]

    @property
    def stem(self) -> str:
        return self.name.replace("-", "_")

    def register(self, app: typer.Typer) -> None:
        """Add this command to `app`."""
        argument = typer.Argument(help=_INPUT_HELP, metavar="INPUT", show_default=False)
        inputs = inspect.Parameter(
            "inputs", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[list[str] | None, argument]
        )
        made = [
            inputs,
            *parameters(self.config, "Method"),
            *parameters(Settings, "Run"),
            *parameters(StreamOptions, "Records"),
        ]
        made += parameters(Face, "Help and messages")
        app.command(self.name, rich_help_panel=self.panel, help=self._help())(with_parameters(self.main, made))

    def _help(self) -> str:
        """Paragraphs on one line each, for the terminal to wrap, then an example a paragraph."""
        paragraphs = [" ".join(paragraph.split()) for paragraph in self.help.split("\n\n")]
        return "\n\n".join([*paragraphs, "Examples:", *(f"$ {example}" for example in self.examples)])

    def main(self, inputs: list[str] | None, **given: Any) -> None:
        """The body Typer calls."""
        owners = (self.config, Settings, StreamOptions)
        face = build(Face, given, {})
        file = read_config(face.config, [f.name for owner in owners for f in dataclasses.fields(owner)])
        config, settings, options = (build(owner, given, file) for owner in owners)
        with guarded_stdout() as stdout:
            if face.dump_config:
                write_json(stdout, {k: v for part in (config, settings, options) for k, v in plain(part).items()})
                return
            method = importlib.import_module(f"pomona.methods.{self.stem}.run")
            if int(os.environ.get("RANK", "0")) > 0:
                method.serve(config, settings)
                return
            console = Console(f"pomona {self.name}", face)
            stream = Stream(
                self.name,
                tuple(inputs or ()),
                options,
                settings,
                stdout=stdout,
                progress=console,
                own_key=self.own_key,
                described={
                    "config": config,
                    "model": settings.model,
                    "dtype": settings.dtype,
                    "seed": settings.seed,
                    "limit": settings.limit,
                    "batch_size": settings.batch_size,
                    "records": options,
                },
            )
            try:
                code = self._run(method, config, settings, stream, stdout, console)
            finally:
                console.close()
        if code != _FINISHED:
            raise typer.Exit(code)

    def _run(self, method: Any, config: Any, settings: Settings, stream: Stream, stdout: Any, console: Console) -> int:
        summary = stream.finished_before()
        if summary is not None:
            console.warn(f"{stream.output} is finished already")
        else:
            with stream:
                extra = method.run(config, settings, stream)
                if settings.dry_run:
                    write_json(stdout, {"command": self.name, "dry_run": True, **extra})
                    return _FINISHED
                stream.summary.update(plain(extra))
            summary = {**stream.counts.summary(), **stream.summary}
        console.close()
        if stream.output is not None:
            write_json(stdout, {"command": self.name, **summary, "output": str(stream.output)})
        console.show(f"pomona {self.name}: {summary_line(summary)}")
        return _INCOMPLETE if summary["rejected"] or summary.get("unanswered") or stream.stopped else _FINISHED
