"""One working invocation per command, so that the contract tests can run them all.

The commands that are not heavy start cold in every contract, the others warm (see `warm`).

A new command needs an entry here; `test_contract` fails until it has one.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomona_cli import commands
from pomona_cli.streaming import StreamCommand
from pomona_cli.toolkit import ListCommand

COMMANDS = [
    importlib.import_module(f"{commands.__name__}.{m.name}").COMMAND for m in pkgutil.iter_modules(commands.__path__)
]
STREAMS = [command.name for command in COMMANDS if isinstance(command, StreamCommand)]
LISTS = [command.name for command in COMMANDS if isinstance(command, ListCommand)]

RECORDS: list[dict[str, Any]] = [
    {
        "id": f"r{number}",
        "instruction": f"Say the number {number} in words.",
        "input": "" if number % 3 else "Use capitals, « please » 🍐.",
        "output": "one two three four five six seven eight nine ten".split()[number % 10] + "!" * (number % 4),
        "kept": {"nested": [number, None, 0.5]},
        "source": "test",
    }
    for number in range(40)
]


def jsonl(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


@dataclass(frozen=True)
class Specimen:
    """Options that make a command do its ordinary work on RECORDS, every record coming out."""

    options: Callable[[Path, Path], list[str]]
    heavy: bool  # loads torch


def _ifd(folder: Path, model: Path) -> list[str]:
    return ["--model", str(model), "--dtype", "float32"]


def _alpagasus(folder: Path, model: Path) -> list[str]:
    path = folder / "ratings.jsonl"
    path.write_bytes(jsonl([{"id": f"r{n}", "score": 5 - (n % 2) / 2} for n in range(200)]))
    return ["--ratings", str(path), "--join", "id"]


SPECIMENS = {
    "ifd-score": Specimen(_ifd, heavy=True),
    "alpagasus-filter": Specimen(_alpagasus, heavy=False),
}


@dataclass(frozen=True)
class DirectorySpecimen:
    """Arguments that make a command do its ordinary work; the first `inputs` of them are no options."""

    quick: Callable[[Path], list[str]]
    slow: Callable[[Path, Path], list[str]]  # long enough to be interrupted
    inputs: int = 1
    heavy: bool = True  # the quick run loads torch
    keeps: bool = True  # what an interrupted run has done is kept in its journal; otherwise it begins again
    leaves: frozenset[str] = frozenset()  # what it leaves beside the journal, where -o is "out"


def _exam(folder: Path) -> list[str]:
    return [_questions(folder, 60), "--model", "mock:oracle", "--strategy", "fs"]


def _long_exam(folder: Path, model: Path) -> list[str]:
    options = ["--strategy", "cot", "--max-tokens", "60", "--thought-tokens", "40", "--dtype", "float32"]
    return [_questions(folder, 60), "--model", str(model), *options, "--judge", "match", "--batch-size", "4"]


def _questions(folder: Path, count: int) -> str:
    path = folder / "questions.jsonl"
    path.write_bytes((Path(__file__).parent.parent / "data/nlpbench/questions.jsonl").read_bytes())
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:count]))
    return path.name


def _separation(folder: Path) -> list[str]:
    return ["--study", "separation", "--kernels", "exp,linear,pow:8", "--sweep", "m=1,4", "--trials", "50"]


def _long_separation(folder: Path, model: Path) -> list[str]:
    return ["--study", "separation", "--sweep", "m=20,21", "--trials", "8000", "--jobs", "2"]


def _adapters(folder: Path) -> list[str]:
    from methods.mera_merge.adapterhub import make_bottleneck

    return [make_bottleneck(folder / name, seed=seed).name for seed, name in enumerate(("one", "two"))]


def _long_merge(folder: Path, model: Path) -> list[str]:
    from tiny import save_tiny_bert

    save_tiny_bert(folder / "base")
    texts = [{"text": f"{word} {number % 7}", "label": word} for number in range(60) for word in ("good", "bad")]
    (folder / "texts.jsonl").write_bytes(jsonl(texts))
    return [*_adapters(folder), "--base-model", "base", "--few-shot", "texts.jsonl", "--shots", "8", "--seeds", "60"]


def _dense(folder: Path) -> list[str]:
    from tiny import save_tiny_llama

    return [save_tiny_llama(folder / "dense").name, "--experts", "2"]


def _long_conversion(folder: Path, model: Path) -> list[str]:
    (folder / "texts.jsonl").write_bytes(jsonl([{"text": "pear plum quince " * (2 + n % 3)} for n in range(40)]))
    return [*_dense(folder), "--train", "texts.jsonl", "--steps", "60", "--batch-size", "4", "--max-length", "32"]


def _digits(folder: Path) -> list[str]:
    import numpy as np
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    few = (images[:60] * 15.9).astype(np.uint8).reshape(-1, 8, 8)
    np.savez(folder / "digits.npz", images=few, labels=labels[:60])
    return ["digits.npz", "--probe", "linear", "--shots", "1", "--draws", "2"]


def _long_extraction(folder: Path, model: Path) -> list[str]:
    return ["builtin:digits", "--noise-average", "8", "--shard-size", "20", "--batch-size", "8", "--dtype", "float32"]


def _classes(folder: Path) -> list[str]:
    options = ["--preset", "digits", "--epochs", "2", "--batch-size", "16", "--compare", "none"]
    return [_digits(folder)[0], *options]


def _long_course(folder: Path, model: Path) -> list[str]:
    return ["builtin:digits", "--epochs", "60", "--compare", "random", "--dtype", "float32"]


DIRECTORIES = {
    "nlpbench-eval": DirectorySpecimen(_exam, _long_exam, heavy=False),
    "attn-compare": DirectorySpecimen(_separation, _long_separation, inputs=0),
    "mera-merge": DirectorySpecimen(_adapters, _long_merge, inputs=2),
    "meo-convert": DirectorySpecimen(_dense, _long_conversion, keeps=False),
    "diffeat-extract": DirectorySpecimen(_digits, _long_extraction, leaves=frozenset({"out.shards"})),
    "madaug-train": DirectorySpecimen(_classes, _long_course, leaves=frozenset({"out.shards"})),
}
