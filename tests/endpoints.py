"""What the chat client's tests share: an endpoint's client, questions, and an ear for warnings."""

from __future__ import annotations

import os
from typing import Any

import pytest

from pomona.io.journal import NoJournal
from pomona.models import asking
from pomona.models.budget import Budget
from pomona.models.chat import ChatClient, Endpoint, Request
from pomona.runtime.progress import Quiet

KEY = "k3y-Secret-of-the-orchard"


class Ear(Quiet):
    """Progress that keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, quick retries, and none of the caller's proxies; import it to use it."""
    for name in os.environ:
        if name.lower().endswith("_proxy") or name.startswith("OPENAI_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(asking, "BACKOFF_BASE", 0.005)


def client(
    url: str, journal: Any = None, budget: Budget | None = None, progress: Any = None, **options: Any
) -> ChatClient:
    endpoint = Endpoint(url, "m", **{"concurrency": 8, "timeout": 5.0, **options})
    return ChatClient(endpoint, NoJournal() if journal is None else journal, budget or Budget(), progress or Quiet())


def question(text: str, **parameters: Any) -> Request:
    return Request((("user", text),), **{"max_tokens": 16, **parameters})
