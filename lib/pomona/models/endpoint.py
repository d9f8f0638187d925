"""What is asked, of whom, and what may come of it; the types that `ChatClient` deals in."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from pomona.errors import UsageError

OFFICIAL = "https://api.openai.com/v1"
_SECRETS = re.compile(r"\bsk-[\w*.-]{4,}|(?i:\bbearer\s+)[\w.~+/=-]+|(?<=://)[^/@\s]+@")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to ask and how hard.

    Attributes:
        base_url: address up to and including /v1; None means $OPENAI_BASE_URL, else OpenAI's.
        model: the name the server knows it by.
        api_key_env: the environment variable that holds the key; local servers need none.
        concurrency: most requests in flight.
        rpm: most requests a minute.
        tpm: most tokens a minute, counting a prompt's estimate and the longest answer allowed.
        timeout: seconds for one attempt.
        retries: attempts after the first.
        patience: seconds for one request, all attempts and the waits between them together.
        max_wait: longest wait in seconds that a server may ask for; beyond it the run ends.
        empty_is_final: an empty reply is what the model had to say: not asked for again, and no fault of the endpoint.
    """

    base_url: str | None
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 32
    rpm: int | None = None
    tpm: int | None = None
    timeout: float = 60.0
    retries: int = 6
    patience: float = 600.0
    max_wait: float = 300.0
    empty_is_final: bool = False

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.retries < 0 or not self.timeout > 0 or not self.patience > 0:
            raise UsageError("--concurrency starts at 1, --retries at 0, and --timeout must be above 0")
        if not self.max_wait >= 0:
            raise UsageError("--max-wait starts at 0")

    @property
    def address(self) -> str:
        """The base address in use."""
        return (self.base_url or os.environ.get("OPENAI_BASE_URL") or OFFICIAL).rstrip("/")

    @property
    def official(self) -> bool:
        """Whether this is OpenAI's own service."""
        return urlsplit(self.address).hostname == urlsplit(OFFICIAL).hostname


@dataclass(frozen=True, slots=True)
class Request:
    """One conversation to complete; messages are (role, content).

    Attributes:
        sample: tells apart independent draws for the same conversation.
        seed: of the sampling, where the model takes one.
        schema: JSON schema that the reply is to follow, as JSON text, where the model can be held to one.
    """

    messages: tuple[tuple[str, str], ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    sample: int = 0
    seed: int | None = None
    schema: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A usable reply.

    Attributes:
        finish_reason: as the server gives it, "stop" and "length" above all; "length" too when a reply beyond all
            measure was cut here; "refusal" when the model declined, and then `text` is how it did.
        cached: it cost nothing now.
        estimated: the server reported no token counts.
        calls: 1, or 0 for a sample that came out of the call of another one, which then has the prompt's tokens.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None
    model: str
    cached: bool
    estimated: bool = False
    calls: int = 1


@dataclass(frozen=True, slots=True)
class Failure:
    """No usable reply.

    Attributes:
        reason: fit for counting, one of "timeout" and "connection" (nothing came back), "rate limited", "http NNN",
            "context overflow" (prompt and reply do not fit the model), "malformed body", "no choices",
            "error in body", "empty answer", "not valid Unicode" and "chat template refused" (it cannot be sent).
        attempts: calls made for it.
        detail: what the server or the network said, without secrets.
        finish_reason: of an empty answer.
    """

    reason: str
    attempts: int
    detail: str = ""
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Unasked:
    """Never sent."""

    reason: str


Outcome = Answer | Failure | Unasked

R = TypeVar("R")
Chain = Generator[Sequence[Request], Sequence[Outcome], R]
"""A conversation in steps: it yields requests that may be asked together, is sent what came of each, in their order,
and returns its result."""


def request_key(endpoint_model: str, request: Request) -> str:
    """The journal's key: SHA-256 over the model, the messages and the sampling parameters, in hexadecimal."""
    parts = [endpoint_model, request.messages, request.max_tokens, request.temperature, request.top_p, request.stop]
    more = {"sample": request.sample or None, "seed": request.seed, "schema": request.schema}
    parts += [[name, value] for name, value in more.items() if value is not None]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_key(endpoint: Endpoint) -> str:
    """The API key in the endpoint's variable, "" for a server that needs none.

    Raises:
        UsageError: the address is not one; OpenAI's own service without a key; a key unfit for a header.
    """
    try:
        address = urlsplit(endpoint.address)
        valid = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise UsageError(
            f"--base-url {redact(endpoint.address)} is not an address", hint="it looks like http://localhost:8000/v1"
        )
    if endpoint.address.endswith("/chat/completions"):
        base = redact(endpoint.address.removesuffix("/chat/completions"))
        raise UsageError("--base-url names one call, not the service", hint=f"without its end: --base-url {base}")
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key and endpoint.official:
        raise UsageError(
            f"no API key: the variable {endpoint.api_key_env} is empty or not set",
            hint=f"export {endpoint.api_key_env}=..., or name a local server with --base-url",
        )
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"the API key in {endpoint.api_key_env} has characters that no key has")
    return key


def redact(text: str, secret: str | None = None) -> str:
    """`text` without `secret`, API keys, bearer tokens and passwords in addresses."""
    if secret:
        text = text.replace(secret, "[redacted]")
    return _SECRETS.sub("[redacted]", text)
