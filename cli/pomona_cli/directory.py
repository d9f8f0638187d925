"""A command that writes a directory: everything but its method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pomona.io.directory import RunDirectory
from pomona_cli.method import MethodCommand
from pomona_cli.output import Console, write_json


@dataclasses.dataclass(frozen=True)
class DirectoryCommand(MethodCommand):
    """A command whose method is ``run.run(config, settings, work)``, which returns its summary and exit code."""

    inputs_help: str = "Files or run directories, as the options say; - or nothing is standard input."

    def work(
        self, method: Any, inputs: tuple[str, ...], options: Mapping[str, Any], stdout: Any, console: Console
    ) -> int:
        """Do the command's work; returns the exit code."""
        config, settings = options["Method"], options["Run"]
        work = RunDirectory(
            self.name,
            inputs,
            settings,
            described=self.described(config, settings),
            progress=console,
            emit=lambda record: write_json(stdout, record),
        )
        with work:
            summary, code = method.run(config, settings, work)
        console.close()
        if summary:
            dry = {"dry_run": True} if settings.dry_run else {}
            write_json(stdout, {"command": self.name, **dry, **summary})
        if work.failure is not None:
            raise work.failure
        return int(code)
