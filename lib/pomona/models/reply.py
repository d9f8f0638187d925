"""What came back from an endpoint, told apart: an answer, or trouble and what to do about it.

A 200 proves little: gateways send HTML, servers under load send empty choices, connections are cut. Nothing here trusts
a field before looking at its type.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import openai
import orjson

from pomona.models.budget import Usage

FREE = Usage()
RETRY_AFTER_CAP = 300.0  # seconds; a server that asks for more is asked again after this
_NEVER_CONNECTED = {"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError"}


@dataclass(frozen=True, slots=True)
class Reply:
    """A usable answer; `usage` is None when the server reported none."""

    text: str
    finish_reason: str | None
    model: str | None
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class Trouble:
    """An attempt without a usable answer.

    Attributes:
        reason: its kind, one of a small set, fit for counting.
        detail: the server's or the network's own words.
        retry: whether the same request may do better later.
        fatal: whether no other request can do better either.
        down: whether it speaks of the endpoint, not of the request.
        unreachable: whether not even a connection came about.
        wait: seconds the server asked us to wait.
        used: tokens it cost; None when it may have been billed and nobody said how much.
    """

    reason: str
    detail: str = ""
    retry: bool = True
    fatal: bool = False
    down: bool = False
    unreachable: bool = False
    wait: float = 0.0
    used: Usage | None = FREE


def read_reply(content: bytes) -> Reply | Trouble:
    """The answer in the body of a 200, or what is wrong with it."""
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        return Trouble("malformed body", f"{error}: {_beginning(content)}", used=None)
    if not isinstance(body, dict):
        return Trouble("malformed body", f"not an object: {_beginning(content)}", used=None)
    usage = _usage(body.get("usage"))
    if body.get("error"):
        return Trouble("error in body", _message(content), used=usage or FREE)
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return Trouble("no choices", _beginning(content), used=usage)
    message = choices[0].get("message")
    text = _text(message.get("content")) if isinstance(message, dict) else ""
    finish_reason, model = choices[0].get("finish_reason"), body.get("model")
    if not text.strip():
        return Trouble("empty answer", f"finish reason: {finish_reason}", used=usage)
    return Reply(text, _string(finish_reason), _string(model), usage)


def read_error(error: openai.OpenAIError | TimeoutError) -> Trouble:
    """What an exception from the client means."""
    if isinstance(error, openai.APIStatusError):
        return _read_status(error.status_code, error.response.headers, error.response.content)
    cause = error.__cause__ or error
    unreachable = type(cause).__name__ in _NEVER_CONNECTED
    used = FREE if unreachable else None
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Trouble("timeout", down=True, unreachable=unreachable, used=used)
    said = str(cause) or type(cause).__name__
    return Trouble("connection", said, down=True, unreachable=unreachable, used=used)


def _read_status(status: int, headers: Mapping[str, str], content: bytes) -> Trouble:
    message = _message(content)
    if status == 429:
        broke = "insufficient_quota" in message
        return Trouble("rate limited", message, fatal=broke, down=True, wait=_retry_after(headers))
    if status in (408, 409) or status >= 500:
        return Trouble(f"http {status}", message, down=status >= 500, wait=_retry_after(headers))
    refused = status in (401, 402, 403) or (status == 404 and "model" in message.lower())
    return Trouble(f"http {status}", message, retry=False, fatal=refused)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds, from either form of Retry-After; 0 when absent, past or unreadable."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), RETRY_AFTER_CAP) if seconds == seconds else 0.0


def _text(content: Any) -> str:
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _usage(value: Any) -> Usage | None:
    """Both counts, or None unless each is a whole number from 0 up."""
    if not isinstance(value, dict):
        return None
    prompt, completion = value.get("prompt_tokens"), value.get("completion_tokens")
    if type(prompt) is int and type(completion) is int and prompt >= 0 and completion >= 0:
        return Usage(prompt, completion)
    return None


def _message(content: bytes) -> str:
    """What a body says of an error: its code and message where it has them, else its beginning."""
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError:
        return _beginning(content)
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        told = [error[key] for key in ("code", "message", "detail") if isinstance(error.get(key), str) and error[key]]
        error = ": ".join(told) or content
    return _beginning(error if isinstance(error, bytes) else str(error).encode(errors="replace"))


def _beginning(content: bytes) -> str:
    # Blanks go first: whoever shows this collapses them, and a secret cut in half at the end could come into view.
    return " ".join(content.decode(errors="replace").split())[:2000]
