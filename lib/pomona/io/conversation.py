"""What an instruction record says: one turn or several, whatever layout it came in.

Three layouts are recognised, in this order: OpenAI-style ``messages`` (``role``/``content``), ShareGPT
``conversations`` (``from``/``value``), and flat Alpaca fields whose names can be changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


class BadRecord(ValueError):
    """The record does not hold an instruction and an answer; the message names the field."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange: an instruction, an optional input it is about (empty when absent), and the answer."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of the flat fields."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"


def turns(record: Mapping[str, Any], fields: Fields) -> tuple[Turn, ...]:
    """The turns of `record`, at least one.

    In chat layouts every assistant message closes a turn. Consecutive user messages are joined by a newline, and a
    system message stands before the instruction it precedes, also after a newline. An input counts as absent when
    the field is missing, null or the empty string, as in the reference code of both selection papers.

    Raises:
        BadRecord: a field is missing or is not text, or a conversation has no assistant message.
    """
    for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if isinstance(record.get(key), list) and fields.instruction not in record:
            return _from_chat(record[key], key, role, content)
    return (
        Turn(
            _text(record, fields.instruction, "--instruction-field"),
            _text(record, fields.input, "--input-field", optional=True),
            _text(record, fields.output, "--output-field"),
        ),
    )


def _text(record: Mapping[str, Any], name: str, option: str, *, optional: bool = False) -> str:
    value = record.get(name)
    if value is None and optional:
        return ""
    if name not in record:
        raise BadRecord(f'field "{name}" is missing (use {option})')
    if not isinstance(value, str):
        raise BadRecord(f'field "{name}" is {_kind(value)}, not text')
    return value


def _from_chat(messages: list[Any], key: str, role_key: str, content_key: str) -> tuple[Turn, ...]:
    found: list[Turn] = []
    pending: list[str] = []
    for number, message in enumerate(messages):
        where = f'"{key}[{number}]"'
        if not isinstance(message, Mapping):
            raise BadRecord(f"{where} is {_kind(message)}, not an object")
        role = _ROLES.get(str(message.get(role_key)).lower())
        if role is None:
            raise BadRecord(f'{where} has no known "{role_key}" (system, user/human or assistant/gpt)')
        text = _content(message.get(content_key), f'"{key}[{number}].{content_key}"')
        if role == "assistant":
            found.append(Turn("\n".join(pending), "", text))
            pending = []
        else:
            pending.append(text)
    if not found:
        raise BadRecord(f'"{key}" has no assistant message')
    return tuple(found)


def _content(value: Any, where: str) -> str:
    """Message content: text, or a list of text parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in value):
        return "".join(part["text"] for part in value)
    raise BadRecord(f"{where} is {_kind(value)}, not text")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list) else "an object"
