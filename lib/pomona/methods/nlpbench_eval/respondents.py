"""Who answers and who judges: an endpoint, a model on this machine, or the oracle, by name.

``openai:NAME`` is an OpenAI-compatible endpoint, ``mock:oracle`` knows every answer, anything else is a local model:
``smollm2``, ``local:PATH``, a directory, a GGUF file or a hub id.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pomona.errors import UsageError
from pomona.io.journal import Journal, NoJournal
from pomona.methods.nlpbench_eval.config import Config
from pomona.methods.nlpbench_eval.oracle import Oracle
from pomona.methods.nlpbench_eval.questions import Question
from pomona.models.endpoint import Answer, Chain, Endpoint, Request, request_key
from pomona.runtime.progress import Progress
from pomona.runtime.settings import Settings

if TYPE_CHECKING:
    from pomona.models.chat import ChatClient
    from pomona.models.loading import Scorer
    from pomona.runtime.device import Runtime

T = TypeVar("T")
R = TypeVar("R")
ENDPOINT, LOCAL, MOCK = "openai:", "local:", "mock:"
_DOWNGRADES = "downgrades"
"""Its key in the journal."""


class Respondent(Protocol):
    """Takes part in conversations."""

    def conversations(self, chains: Iterable[tuple[T, Chain[R]]]) -> Iterator[tuple[T, R]]:
        """Each item with what its conversation returned, as they finish."""


def is_local(name: str | None) -> bool:
    """Whether `name` is a model that this machine runs."""
    return name is None or not (name.startswith((ENDPOINT, MOCK)) or name in ("match", "human"))


class Respondents:
    """Opens respondents by name; a context manager, which lets the other processes of a launch end."""

    def __init__(self, config: Config, settings: Settings, progress: Progress) -> None:
        self._config = config
        self._settings = settings
        self.progress = progress
        self._runtime: Runtime | None = None
        self._loaded: dict[str, Scorer] = {}
        self.clients: list[ChatClient] = []
        self.budget = config.budget()
        self.journal: Journal | NoJournal = NoJournal()

    def __enter__(self) -> Respondents:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._runtime is None and int(os.environ.get("WORLD_SIZE", "1")) > 1 and self._needs_runtime():
            self._open_runtime()
        if self._runtime is not None:
            self._runtime.close()

    def open(self, name: str | None, *, base_url: str | None = None, questions: Sequence[Question] = ()) -> Respondent:
        """The respondent called `name`; `questions` are what the oracle may be asked.

        Raises:
            UsageError: a name that means nothing, or an endpoint's address or key that is unfit.
            MissingError, UnavailableError: a local model that cannot be loaded.
        """
        if name is not None and name.startswith(MOCK):
            if name != Oracle.identity:
                raise UsageError(f"--model {name}: expected {Oracle.identity}")
            return Oracle(questions)
        if name is not None and name.startswith(ENDPOINT):
            options = self._config if base_url is None else replace(self._config, base_url=base_url)
            return _Endpoint(options.endpoint(_after(name, ENDPOINT), empty_is_final=True), self)
        return self._local(_after(name, LOCAL) if name is not None and name.startswith(LOCAL) else name)

    def downgrades(self) -> dict[str, str]:
        """Parameters that an endpoint refused, and what was done instead; kept in the journal for a later scoring."""
        known = {name: str(how) for name, how in (self.journal.get(_DOWNGRADES) or {}).items()}
        found = known | {name: how for client in self.clients for name, how in client.downgrades.items()}
        if found != known:
            self.journal.append(_DOWNGRADES, found)
        return found

    def _local(self, name: str | None) -> Respondent:
        from pomona.models.local import LocalModel

        key = name or ""
        if key not in self._loaded:
            self.progress.start("loading the model")
            runtime = self._open_runtime()
            runtime.map("load", [key] * runtime.world)
        return LocalModel(self._loaded[key], self.journal, batch_size=self._settings.batch_size, progress=self.progress)

    def _open_runtime(self) -> Runtime:
        from pomona.runtime.device import Runtime

        if self._runtime is None:
            settings = self._settings
            self._runtime = Runtime.open(settings.device, settings.dtype, settings.seed)
            self._runtime.register("load", self._load)
        return self._runtime

    def _load(self, key: str) -> None:
        from pomona.models.loading import load_causal_lm

        assert self._runtime is not None
        self._loaded[key] = load_causal_lm(key or None, self._runtime)

    def _needs_runtime(self) -> bool:
        judge = self._config.judge
        return is_local(self._settings.model) or (judge is not None and is_local(judge))

    def serve(self) -> None:
        """In the other processes of a launch: do this process's share of what the main one asks a local model."""
        if self._needs_runtime() and not self._settings.dry_run:
            self._open_runtime().serve()


class _Endpoint:
    """An endpoint that is not called upon while the journal has every answer, so that scoring anew needs no client."""

    def __init__(self, endpoint: Endpoint, respondents: Respondents) -> None:
        self._endpoint = endpoint
        self._respondents = respondents

    def conversations(self, chains: Iterable[tuple[T, Chain[R]]]) -> Iterator[tuple[T, R]]:
        """Each item with what its conversation returned: first those that the journal can finish."""
        if len(self._respondents.journal):
            left: list[tuple[T, Chain[R]]] = []
            for item, chain in chains:
                try:
                    left.append((item, _continued(chain, self._recalled(chain))))
                except StopIteration as end:
                    yield item, end.value
            chains = left
            if not left:
                return
        from pomona.models.chat import ChatClient

        shared = self._respondents
        client = ChatClient(self._endpoint, shared.journal, shared.budget, shared.progress)
        shared.clients.append(client)
        yield from client.conversations(chains)

    def _recalled(self, chain: Chain[Any]) -> Sequence[Request]:
        """Go on with `chain` as far as the journal knows; returns the requests that it does not, or StopIteration."""
        requests = next(chain)
        while True:
            held = [self._respondents.journal.get(request_key(self._endpoint.model, request)) for request in requests]
            answers = [Answer(**entry, cached=True) for entry in held if entry is not None]
            if len(answers) < len(requests):
                return requests
            requests = chain.send(answers)


def _continued(chain: Chain[R], requests: Sequence[Request]) -> Chain[R]:
    """`chain` from where it has just asked `requests`."""
    while True:
        outcomes = yield requests
        try:
            requests = chain.send(outcomes)
        except StopIteration as end:
            result: R = end.value
            return result


def _after(name: str, prefix: str) -> str:
    rest = name.removeprefix(prefix)
    if not rest:
        raise UsageError(f"--model {name} : a name is missing after the colon")
    return rest
