"""A command that takes records and gives records: everything but its method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pomona.io.manifest import plain
from pomona.io.stream import Stream, StreamOptions
from pomona.runtime.settings import Settings
from pomona_cli.method import FINISHED, INCOMPLETE, MethodCommand
from pomona_cli.output import Console, summary_line, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamCommand(MethodCommand):
    """A command whose method is ``run.run(config, settings, stream)``.

    Attributes:
        own_key: the one key under which it adds to a record.
    """

    own_key: str

    inputs_help: str = "Files, saved dataset directories or hf:NAME[:SPLIT]; - or nothing is standard input."

    @property
    def owners(self) -> dict[str, type[Any]]:
        return {**super().owners, "Records": StreamOptions}

    def work(
        self, method: Any, inputs: tuple[str, ...], options: Mapping[str, Any], stdout: Any, console: Console
    ) -> int:
        """Do the command's work; returns the exit code."""
        config, settings, records = options["Method"], options["Run"], options["Records"]
        stream = Stream(
            self.name,
            inputs,
            records,
            settings,
            stdout=stdout,
            progress=console,
            own_key=self.own_key,
            described={**self.described(config, settings), "records": records},
        )
        return self._run(method, config, settings, stream, stdout, console)

    def _run(self, method: Any, config: Any, settings: Settings, stream: Stream, stdout: Any, console: Console) -> int:
        summary = stream.finished_before()
        if summary is not None:
            console.warn(f"{stream.output} is finished already")
        else:
            with stream:
                extra = method.run(config, settings, stream)
                if settings.dry_run:
                    write_json(stdout, {"command": self.name, "dry_run": True, **extra})
                    return FINISHED
                stream.summary.update(plain(extra))
            summary = {**stream.counts.summary(), **stream.summary}
        console.close()
        if stream.output is not None:
            write_json(stdout, {"command": self.name, **summary, "output": str(stream.output)})
        console.show(f"pomona {self.name}: {summary_line(summary)}")
        return INCOMPLETE if summary["rejected"] or summary.get("unanswered") or stream.stopped else FINISHED
