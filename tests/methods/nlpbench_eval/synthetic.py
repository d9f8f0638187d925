"""A made-up data set with exactly the counts of the official one (paper table 1), for tests.

Nothing in it is taken from the official questions, which may not be copied. Contexts hold five questions each where
they can, mixing types.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONTEXT = {"sa": 130, "mc": 15, "math": 24}
ALONE = {"sa": 62, "mc": 144, "math": 3}
CATEGORIES = {"lmsp": 162, "ai": 75, "sl": 69, "ot": 32, "irtm": 27, "pdda": 13}
LONG_NAMES = {
    "lmsp": "Language Modeling and Syntax and Parsing",
    "ai": "Artificial Intelligence",
    "sl": "Semantics and Logic",
    "ot": "Other Topics",
    "irtm": "Information Retrieval and Topic Modeling",
    "pdda": "Pragmatics and Discourse and Dialogue and Applications",
}
GROUP = 5


def _spread(counts: dict[str, int]) -> Iterator[str]:
    """The keys, each as often as its count says, as evenly mixed as that allows."""
    total = sum(counts.values())
    given = dict.fromkeys(counts, 0)
    for place in range(1, total + 1):
        key = max(counts, key=lambda k: counts[k] * place / total - given[k])
        given[key] += 1
        yield key


def synthetic() -> list[dict[str, Any]]:
    """378 records of our own schema."""
    categories = _spread(CATEGORIES)
    records = []
    for place, kind in enumerate(_spread(CONTEXT)):
        group, turn = divmod(place, GROUP)
        about = f"Corpus {group} has {group + 7} sentences and {3 * group + 11} distinct words, as follows. " * 3
        records.append(_record(f"g{group:02d}-{turn}", kind, next(categories), place, about, f"g{group:02d}", turn))
    for place, kind in enumerate(_spread(ALONE)):
        records.append(_record(f"q{place:03d}", kind, next(categories), 500 + place))
    return records


def _record(
    name: str,
    kind: str,
    category: str,
    number: int,
    context: str | None = None,
    group: str | None = None,
    turn: int = 0,
) -> dict[str, Any]:
    record: dict[str, Any] = {"id": name, "group": group, "turn": turn, "context": context, "type": kind}
    if kind == "mc":
        options = [f"Option {letter} of item {number}" for letter in "abcd"]
        answer: Any = [number % 4] if number % 5 else sorted({number % 4, (number + 1) % 4})
        record |= {"question": f"Which options fit item number {number}?", "options": options, "answer": answer}
    elif kind == "math":
        record |= {"question": f"How much is {number} divided by 8, as a decimal?", "answer": [str(number / 8)]}
        record["solution"] = f"{number}/8 = {number / 8}"
    else:
        record |= {"question": f"What is the name of item number {number}?", "answer": [f"Specimen {number}"]}
    return {**record, "category": category, "unique": kind == "sa"}


def write(path: Path, records: list[dict[str, Any]] | None = None) -> Path:
    """Write `records`, by default all of them, as JSONL."""
    lines = [json.dumps(record) for record in (synthetic() if records is None else records)]
    path.write_text("\n".join(lines) + "\n")
    return path


def official(folder: Path, records: list[dict[str, Any]] | None = None) -> tuple[Path, Path]:
    """The same in the layout of the official files: `w_ctx.json` and `wo_ctx.json`."""
    kinds = {"mc": 0, "sa": 1, "math": 2}
    single, groups = [], []
    for group, members in itertools.groupby(synthetic() if records is None else records, key=lambda r: r["group"]):
        turns = list(members)
        if group is None:
            single += [
                {
                    "question": r["question"],
                    "type": kinds[r["type"]],
                    **({"options": r["options"]} if r["type"] == "mc" else {}),
                    "answer": r["answer"] if r["type"] == "mc" else r["answer"][0],
                    "category": LONG_NAMES[r["category"]],
                    **({"unique_ans": 1} if r["unique"] else {}),
                }
                for r in turns
            ]
        else:
            groups.append(
                {
                    "context": turns[0]["context"],
                    "questions": [r["question"] for r in turns],
                    "type": [kinds[r["type"]] for r in turns],
                    "options": [r.get("options") for r in turns],
                    "answers": [r["answer"] if r["type"] == "mc" else r["answer"][0] for r in turns],
                    "category": [LONG_NAMES[r["category"]] for r in turns],
                    "unique_ans": [int(r["unique"]) for r in turns],
                }
            )
    paths = folder / "w_ctx.json", folder / "wo_ctx.json"
    for path, entries in zip(paths, (groups, single), strict=True):
        path.write_text(json.dumps(entries, indent=1))
    return paths
