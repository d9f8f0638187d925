"""How an endpoint wants to be asked: the body of a request, and what it must do without on this server.

Servers differ in the parameters they take. One that names a parameter it does not support is asked without it, or with
its other name, from then on. What was refused is never sent again, so each parameter can cost a request one repetition.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from pomona.models.endpoint import Endpoint, Request

# In the order in which to give them up where a refusal names several.
_DISPENSABLE = ("response_format", "seed", "n", "top_p", "temperature")
_OTHER_NAME = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
_UNSUPPORTED = re.compile(
    r"(?:\bun|not |n't |not yet |not currently )support|un(?:recognized|recognised|known|expected|available)|"
    r"extra (?:inputs|fields)|extra_forbidden|not (?:permitted|allowed|available|implemented)|only the default|"
    r"cannot both|deprecated|no longer|invalid (?:parameter|argument|field)",
    re.IGNORECASE,
)
# To do without these changes how a reply is come by, not what is asked: a complaint that names one is enough.
_NAMED: dict[str, re.Pattern[str]] = {
    "n": re.compile(r"""(['"`])n\1|(?<!\w)n ?(?:[:=>]|must|is|should)|\b(?:one|multiple) (?:completion )?choices?\b"""),
    "response_format": re.compile(r"response_format|json_schema|structured output", re.IGNORECASE),
}


class Dialect:
    """What one endpoint takes; `downgrades` says in words what it does not, by parameter."""

    def __init__(self, endpoint: Endpoint, warn: Callable[[str], None]) -> None:
        self.downgrades: dict[str, str] = {}
        self._model = endpoint.model
        # OpenAI's newer models refuse the older name, other servers may not know the newer one.
        self._limit = "max_completion_tokens" if endpoint.official else "max_tokens"
        self._warn = warn

    @property
    def takes_n(self) -> bool:
        """Whether several samples may be asked for in one call."""
        return "n" not in self.downgrades

    def body(self, request: Request, samples: int) -> dict[str, Any]:
        """What to send for `request` and the `samples` - 1 that follow it."""
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": role, "content": content} for role, content in request.messages],
            "temperature": request.temperature,
            "top_p": request.top_p,
            self._limit: request.max_tokens,
        }
        if request.stop:
            body["stop"] = list(request.stop)
        if request.seed is not None:
            body["seed"] = request.seed + request.sample  # or all samples would be alike
        if samples > 1:
            body["n"] = samples
        if request.schema is not None:
            schema = {"name": "reply", "strict": True, "schema": orjson.loads(request.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {name: value for name, value in body.items() if name not in self.downgrades}

    def give_way(self, sent: Mapping[str, Any], refusal: bytes) -> bool:
        """Do without the parameter of `sent` that `refusal`, the body of a 400 or 422, names as unsupported.

        Returns whether asking again makes sense: `body` then differs from `sent`.
        """
        name = _refused(sent, *_complaint(refusal))
        if name is None or name in self.downgrades:  # the latter: sent before an earlier refusal came back
            return name is not None
        other = _OTHER_NAME.get(name)
        if other in self.downgrades:
            return False  # it takes neither name: there is no asking without a limit
        if other is not None:
            self._limit = other
        self.do_without(name, f"refused, {other} is sent instead" if other else "refused, no longer sent")
        return True

    def do_without(self, name: str, how: str) -> None:
        """Note a downgrade and tell of it, the first time."""
        if name not in self.downgrades:
            self.downgrades[name] = how
            self._warn(f"the endpoint does not support {name}: {how}")


def _refused(sent: Mapping[str, Any], parameter: str, complaint: str) -> str | None:
    """The parameter of `sent` that is not supported: the one the server's error is filed under, else one it names."""
    unsupported = _UNSUPPORTED.search(complaint) is not None
    candidates = [name for name in (*_DISPENSABLE, *_OTHER_NAME) if name in sent and (unsupported or name in _NAMED)]
    filed = [name for name in candidates if parameter == name or parameter.startswith(f"{name}.")]
    named = [name for name in candidates if _NAMED.get(name, re.compile(rf"\b{name}\b")).search(complaint)]
    return next(iter(filed + named), None)


def _complaint(refusal: bytes) -> tuple[str, str]:
    """The parameter that an error is filed under, "" where it is none, and its words.

    Both are sought where OpenAI's and FastAPI's errors have them. What a server echoes of the request is left out: a
    prompt may well speak of temperature.
    """
    try:
        body = orjson.loads(refusal)
    except orjson.JSONDecodeError:
        return "", refusal[:2000].decode(errors="replace")
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return "", error[:2000] if isinstance(error, str) else ""
    message = error.get("message")
    detail = message.get("detail") if isinstance(message, dict) else error.get("detail")
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):
        first = detail[0]
        place = first["loc"] if isinstance(first.get("loc"), list) else []
        named = [part for part in place if isinstance(part, str) and part != "body"]
        return ".".join(named), f"{first.get('type')}: {first.get('msg')}"[:2000]
    words = [text for text in (error.get("code"), message, detail) if isinstance(text, str)]
    return str(error.get("param") or ""), ": ".join(words)[:2000]
