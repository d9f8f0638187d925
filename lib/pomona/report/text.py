"""Text of strangers made fit to show: on a line, in a Markdown cell, in a block, in columns of a terminal."""

from __future__ import annotations

import unicodedata


def one_line(text: str, room: int) -> str:
    """`text` on one line of at most `room` characters, without what could steer a terminal or reorder a line."""
    shown = text[: 8 * room]
    if not shown.isprintable():
        shown = "".join(" " if c.isspace() else c if _harmless(c) else "\ufffd" for c in shown)
    shown = " ".join(shown.split())
    return shown if len(shown) <= room and len(text) <= 8 * room else shown[: room - 1].rstrip() + "…"


def lines(text: str) -> str:
    """`text` as it is broken into lines, otherwise as harmless as `one_line`; a tab becomes four spaces."""
    shown = text.expandtabs(4) if "\t" in text else text
    if "\n" not in shown and shown.isprintable():
        return shown
    return "\n".join(
        line if line.isprintable() else "".join(" " if c.isspace() else c if _harmless(c) else "\ufffd" for c in line)
        for line in shown.splitlines()
    )


def _harmless(character: str) -> bool:
    # Cc: control (escape sequences), Cf: format (bidirectional overrides, zero width), Cs: lone surrogates
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn")


def escape(text: str) -> str:
    """`text` so that Markdown shows it as it is: no markup, no link, no HTML, no end of a table cell."""
    # without brackets, parentheses and exclamation marks mean nothing
    escaped = "".join(f"&#{ord(c)};" if c in "&<>|`@$\\*_[]#~{}" else c for c in text)
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;")


def columns(text: str) -> int:
    """The columns that `text`, one harmless line, takes up in a terminal."""
    if text.isascii():
        return len(text)
    return sum(_width(c) for c in text)


def fit(text: str, room: int) -> str:
    """`text` on one harmless line of at most `room` columns."""
    shown = one_line(text, max(2, room))
    if columns(shown) <= room:
        return shown
    kept, left = [], room - 1
    for c in shown:
        left -= _width(c)
        if left < 0:
            break
        kept.append(c)
    return "".join(kept).rstrip() + "…"


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """`text`, harmless, in lines of at most `width` columns, the second and later ones behind `indent`."""
    wrapped = [""]
    for word in one_line(text, 20 * width).split(" "):
        word = fit(word, width - len(indent))
        if wrapped[-1] and columns(wrapped[-1]) + 1 + columns(word) > width:
            wrapped.append(indent + word)
        else:
            wrapped[-1] += f" {word}" if wrapped[-1] else word
    return wrapped


def _width(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
