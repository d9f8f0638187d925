"""A command that writes a directory, or one file: everything but its method."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from pomona.errors import UsageError
from pomona.io.directory import RunDirectory, written_through
from pomona.io.single import RunFile
from pomona_cli.method import MethodCommand
from pomona_cli.output import Console, write_json

_FILE = re.compile(r"\.(csv|tsv|json|parquet|npy|npz|pt|pth|pkl|h5|arrow|feather|txt)(\.(gz|zst|xz|bz2|zip))?", re.I)


@dataclasses.dataclass(frozen=True)
class DirectoryCommand(MethodCommand):
    """A command whose method is ``run.run(config, settings, work)``, which returns its summary and exit code.

    Attributes:
        file_suffixes: an output that ends in one of them is a file, and `work` is a `RunFile`.
    """

    inputs_help: str = "Files or run directories, as the options say; - or nothing is standard input."
    file_suffixes: tuple[str, ...] = ()

    def work(
        self, method: Any, inputs: tuple[str, ...], options: Mapping[str, Any], stdout: Any, console: Console
    ) -> int:
        """Do the command's work; returns the exit code."""
        config, settings = options["Method"], options["Run"]
        if self.file_suffixes and str(settings.output) == "-":
            settings = dataclasses.replace(settings, output=None)
        output = written_through(settings.output)
        single = output is not None and output.name.lower().endswith(self.file_suffixes)
        if self.file_suffixes and output is not None and not single and _FILE.fullmatch("".join(output.suffixes[-2:])):
            raise UsageError(
                f"-o {output.name}: a file of this command ends in {', '.join(self.file_suffixes)}",
                hint="and a directory in none that other files have",
            )
        work = (RunFile if single else RunDirectory)(
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
