"""Model cards: the README.md that tells what a model was made of, how, and what it is not known to do."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomona.io.manifest import plain
from pomona.report.sections import table_lines
from pomona.report.text import escape, lines, one_line

_ROOM = 2_000  # characters of a sentence
_README = 2**20  # bytes of another's card that are looked at
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{1,39}")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_OPENING = re.compile(r"^(\d*)([-+=.)])")
_FRONT = re.compile(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)
_LICENCE = re.compile(r"^licen[sc]e:[ \t]*(['\"]?)([^'\"#\n]+?)\1[ \t]*(?:#.*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Parent:
    """What a model was made from.

    Attributes:
        name: as people know it, never a place on this machine.
        role: what it gave, such as "adapter, weight 0.5".
        licence: as found with it; None where none is stated.
        identifier: its name on the hub; None of what has none.
    """

    name: str
    role: str
    licence: str | None = None
    identifier: str | None = None


def model_card(
    title: str,
    summary: str,
    *,
    parents: Sequence[Parent],
    method: Sequence[str],
    command: str,
    metrics: Mapping[str, str],
    limits: Sequence[str],
    tags: Sequence[str] = (),
    library: str | None = "transformers",
    usage: str | None = None,
) -> str:
    """The text of README.md, with the front matter that the hub reads. No text given can become markup.

    The licence is that of all parents if they state one and the same, otherwise "other".

    Args:
        method: sentences on how it was made.
        command: the command line that made it.
        metrics: figures with their units, by what they measure.
        usage: Python that loads it.
    """
    licence = common_licence(parents)
    return "\n".join([*_front_matter(parents, licence, tags, library), ""]) + "\n".join(
        _body(title, summary, parents, licence, method, command, metrics, limits, usage)
    )


def command_line(command: str, inputs: Sequence[str], *options: Any) -> str:
    """What to type for the same again: `inputs`, and of each dataclass of `options` those that are not by default.

    Of an absolute path the last name alone is told, as where it lies on this machine is nobody's concern.
    """
    words = ["pomona", command, *(shlex.quote(one_line(name, _ROOM)) for name in inputs)]
    for option in options:
        for field in dataclasses.fields(option):
            value, flag = getattr(option, field.name), field.name.replace("_", "-")
            if value == field.default:
                continue
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
                continue
            told = str(plain(Path(str(value)).name if Path(str(value)).is_absolute() else str(value)))
            words += [f"--{flag}", shlex.quote(told)]
    return " ".join([*words, "-o", "DIR"])


def common_licence(parents: Sequence[Parent]) -> str:
    """The identifier of the licence that every parent states, in lower case; "other" where there is none such."""
    stated = {(parent.licence or "").strip().lower() for parent in parents}
    found = stated.pop() if len(stated) == 1 else ""
    return found if _IDENTIFIER.fullmatch(found) else "other"


def stated_licence(folder: Path) -> str | None:
    """The licence that the front matter of a directory's README.md states, None where it does not."""
    try:
        with (folder / "README.md").open("rb") as file:
            text = file.read(_README).decode("utf-8-sig", "replace").replace("\r\n", "\n")
    except OSError:
        return None
    front = _FRONT.match(text)
    found = _LICENCE.search(front[1]) if front else None
    return one_line(found[2], 80) if found else None


def _front_matter(parents: Sequence[Parent], licence: str, tags: Sequence[str], library: str | None) -> Iterator[str]:
    bases = dict.fromkeys(p.identifier for p in parents if p.identifier and _HUB.fullmatch(p.identifier))
    yield "---"
    yield f"license: {_quoted(licence)}"
    for key, values in (("base_model", bases), ("tags", dict.fromkeys(["pomona", *tags]))):
        if values:
            yield f"{key}:"
            yield from (f"- {_quoted(value)}" for value in values)
    if library:
        yield f"library_name: {_quoted(library)}"
    yield "---"


def _quoted(text: str) -> str:
    """`text` as YAML, which takes a JSON string of printable characters for one."""
    return json.dumps(one_line(text, 120), ensure_ascii=False)


def _body(
    title: str,
    summary: str,
    parents: Sequence[Parent],
    licence: str,
    method: Sequence[str],
    command: str,
    metrics: Mapping[str, str],
    limits: Sequence[str],
    usage: str | None,
) -> Iterator[str]:
    yield f"\n# {_safe(title, 120)}\n"
    yield f"{_safe(summary)}\n"
    yield "## Made from\n"
    rows = [[parent.name, parent.role, parent.licence or "not stated"] for parent in parents]
    yield from table_lines(["parent", "role", "licence"], rows)
    yield ""
    if licence == "other":
        yield f"{_terms(parents)}\n"
    yield "## How\n"
    for said in method:
        yield f"{_safe(said)}\n"
    yield from _block(one_line(command, _ROOM), "sh")
    if metrics:
        yield "## Measured\n"
        yield from table_lines(["", "value"], [[name, value] for name, value in metrics.items()])
        yield ""
    if usage:
        yield "## Use\n"
        yield from _block(lines(usage).strip("\n"), "python")
    yield "## Limits\n"
    for said in limits or ("Nothing was measured beyond what stands above.",):
        yield f"- {_safe(said)}"
    yield ""


def _terms(parents: Sequence[Parent]) -> str:
    if len(parents) > 1:
        return "Its parents do not state one licence for all: what each of them asks for holds here too."
    if any(parent.licence for parent in parents):
        return "What its parent's licence asks for holds here too."
    return "Its parent states no licence: ask its makers before you pass this on."


def _safe(text: str, room: int = _ROOM) -> str:
    """`text` as a paragraph of its own: its first characters make no list, rule or heading either."""
    said = escape(one_line(text, room))
    return _OPENING.sub(lambda found: f"{found[1]}&#{ord(found[2])};", said)


def _block(text: str, language: str) -> Iterator[str]:
    """`text` between fences that are longer than any within it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    yield f"{fence}{language}\n{text}\n{fence}\n"
