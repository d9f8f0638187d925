"""``pomona methods``."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator

from pomona import methods
from pomona_cli.toolkit import ListCommand


def rows() -> Iterator[dict[str, object]]:
    """Each method's own account of itself, read from its docstring."""
    for module in pkgutil.iter_modules(methods.__path__):
        text = importlib.import_module(f"{methods.__name__}.{module.name}").__doc__ or ""
        title, claim, deviations = describe(text)
        paper = re.search(r"arXiv (\d{4}\.\d{5})", title)
        yield {
            "command": module.name.replace("_", "-"),
            "paper": f"https://arxiv.org/abs/{paper[1]}" if paper else title,
            "title": title,
            "claim": claim,
            "deviations": deviations,
        }


def describe(text: str) -> tuple[str, str, list[str]]:
    """Title, claim and deviations of a method's docstring.

    The title is its first line, the claim the paragraph that begins "Claim.", the deviations the bulleted list under
    the paragraph that begins "Deviations".
    """
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    claim = next((p.removeprefix("Claim.").strip() for p in paragraphs if p.startswith("Claim.")), "")
    section = re.search(r"^Deviations[^\n]*\n(.*?)(?=^[^\s*-][^\n]*\n\n|\Z)", text, re.S | re.M)
    items = re.split(r"^\s*[*-] ", section[1], flags=re.M)[1:] if section else []
    return paragraphs[0].rstrip("."), claim, [" ".join(item.split()) for item in items]


COMMAND = ListCommand(name="methods", help="The methods: paper, claim, and where we deviate from it.", rows=rows)
