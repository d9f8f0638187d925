"""What came back from an endpoint, told apart: an answer, or trouble and what to do about it.

A 200 proves little: gateways send HTML, servers under load send empty choices, connections are cut. Nothing here trusts
a field before looking at its type, or a body to be of bearable size.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import openai
import orjson

from pomona.models.budget import Usage

FREE = Usage()
MAX_BODY = 64 << 20  # bytes; what is longer is not read to its end
MAX_TEXT = 1 << 20  # characters of one reply; the rest is cut off
RETRY_AFTER_CAP = 366 * 86400.0  # seconds; a server that asks for more is understood to ask for this
_NEVER_CONNECTED = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientHttpProxyError,
    aiohttp.InvalidURL,
)
_CONTEXT_OVERFLOW = re.compile(
    r"context[_ ](?:length|size|window|limit)|(?:prompt|input) is too long|max_model_len|input token count",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Choice:
    """A usable text."""

    text: str
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Reply:
    """One choice or more, usable or not, in the server's order; `usage` is None when the server reported none."""

    choices: tuple[Choice | Trouble, ...]
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
        overrun: whether the server had too much to do.
        final: whether it is the model's last word: not to be retried, and no fault of the endpoint.
        wait: seconds the server asked us to wait.
        finish_reason: of an empty answer.
        used: tokens it cost; None when it may have been billed and nobody said how much.
    """

    reason: str
    detail: str = ""
    retry: bool = True
    fatal: bool = False
    down: bool = False
    unreachable: bool = False
    overrun: bool = False
    final: bool = False
    wait: float = 0.0
    finish_reason: str | None = None
    used: Usage | None = FREE


def read_reply(content: bytes, *, empty_is_final: bool = False) -> Reply | Trouble:
    """The choices in the body of a 200, or what is wrong with it as a whole."""
    if len(content) > MAX_BODY:
        return Trouble("malformed body", f"longer than {MAX_BODY >> 20} MiB: {_beginning(content[:8000])}", used=None)
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
    if not isinstance(choices, list) or not choices:
        return Trouble("no choices", _beginning(content), used=usage)
    read = tuple(_read_choice(choice, empty_is_final) for choice in choices)
    return Reply(read, _string(body.get("model")), usage)


def _read_choice(choice: Any, empty_is_final: bool) -> Choice | Trouble:
    if not isinstance(choice, dict):
        return Trouble("no choices", f"in place of one: {_beginning(str(choice).encode(errors='replace'))}")
    message, finish_reason = choice.get("message"), _string(choice.get("finish_reason"))
    text = _text(message.get("content")) if isinstance(message, dict) else ""
    if text.strip():
        return Choice(text, finish_reason) if len(text) <= MAX_TEXT else Choice(text[:MAX_TEXT], "length")
    refusal = _string(message.get("refusal")) if isinstance(message, dict) else None
    if refusal:
        return Choice(refusal[:MAX_TEXT], "refusal")
    if finish_reason == "content_filter":
        return Choice(text, finish_reason)
    said = f"finish reason: {finish_reason}"
    return Trouble("empty answer", said, final=empty_is_final, finish_reason=finish_reason)


def read_error(error: openai.OpenAIError | aiohttp.ClientError | TimeoutError) -> Trouble:
    """What an exception from the client means."""
    if isinstance(error, openai.APIStatusError):
        return _read_status(error.status_code, error.response.headers, error.response.content)
    # The network's own error is inside. The SDK's wrapping takes a reset connection for a time-out while connecting.
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, aiohttp.ClientError | TimeoutError):
        cause = cause.__cause__
    unreachable = isinstance(cause, _NEVER_CONNECTED)
    used = FREE if unreachable else None
    if isinstance(cause, TimeoutError):
        return Trouble("timeout", down=True, unreachable=unreachable, used=used)
    said = str(cause) or type(cause).__name__
    return Trouble("connection", said, down=True, unreachable=unreachable, used=used)


def _read_status(status: int, headers: Mapping[str, str], content: bytes) -> Trouble:
    message, wait = _message(content), _retry_after(headers)
    if status == 429:
        broke = "insufficient_quota" in message
        return Trouble("rate limited", message, fatal=broke, down=True, overrun=True, wait=wait)
    if status in (408, 409) or status >= 500:
        return Trouble(f"http {status}", message, down=status >= 500, overrun=status == 503, wait=wait)
    if status in (400, 413) and _CONTEXT_OVERFLOW.search(message):
        return Trouble("context overflow", message, retry=False)
    refused = status in (401, 402, 403) or (status == 404 and "model" in message.lower())
    return Trouble(f"http {status}", message, retry=False, fatal=refused)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds, from retry-after-ms or either form of Retry-After; 0 when absent, past or unreadable."""
    seconds = _float(headers.get("retry-after-ms", "")) / 1000
    if math.isnan(seconds):
        seconds = _float(headers.get("retry-after", ""))
    if math.isnan(seconds):
        try:
            seconds = parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), RETRY_AFTER_CAP)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


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
