"""Does it matter which adapters are merged? Few-shot tuning after merging within a track and across tracks.

    python tests/bench/mera_tracks.py [--shots 16] [--seeds 5]

Four adapters of MiniLM, each trained on 384 templated sentences of one domain: two tell sentiment (films, food), two
tell form (films: negated or not; food: said by us or not). They are merged by transport on weights: those of the
target's track, those of the other track, one of each, and all. Each merged adapter is tuned on a few sentences about
hotels, whose words of praise and blame are others, for sentiment, and so is what could be tuned instead. Shots and
heads are the same for all. No sign is promised. Results go to results/mera_tracks.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

import pomona
from pomona.io.labelled import Labelled
from pomona.methods.mera_merge.adapters import Adapter
from pomona.methods.mera_merge.config import FewShotOptions
from pomona.methods.mera_merge.fewshot.arms import new_head
from pomona.methods.mera_merge.fewshot.study import Study, examples, run_few_shot
from pomona.methods.mera_merge.fewshot.summary import summarise
from pomona.methods.mera_merge.fusion import fuse
from pomona.models.loading import Loaded, load_model
from pomona.runtime.device import Runtime
from pomona.runtime.progress import Quiet

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data/recipes"))

import adapters as recipe  # noqa: E402
import sentiment  # noqa: E402

TASKS = {
    "sentiment of films": ("films", lambda record: record["label"]),
    "sentiment of food": ("food", lambda record: record["label"]),
    "negation, films": ("films", lambda record: str(any(w in record["text"] for w in (" not ", "never", "Nobody")))),
    "first person, food": ("food", lambda record: str(record["text"].startswith(("I ", "We ")))),
}
MERGES = {
    "same track": ("sentiment of films", "sentiment of food"),
    "other track": ("negation, films", "first person, food"),
    "one of each": ("sentiment of films", "first person, food"),
    "all": tuple(TASKS),
}


def domain(name: str, *, late: bool) -> list[dict[str, str]]:
    """Sentences with the first or the last half of the words of praise and blame."""
    half = slice(5, None) if late else slice(0, 5)
    words = {*sentiment.GOOD[half], *sentiment.BAD[half]}
    return [record for record in sentiment.sentences(name) if record["text"].strip(".").split()[-1] in words]


def pretrained(base: Loaded, folder: Path) -> dict[str, Adapter]:
    """An adapter for each of `TASKS`."""
    found = {}
    for number, (task, (name, label)) in enumerate(TASKS.items()):
        records = domain(name, late=False)[: recipe.TRAIN + 128]
        names = sorted({label(record) for record in records})
        data = Labelled([(r["text"],) for r in records], [names.index(label(r)) for r in records], names)
        head: nn.Linear = new_head(base.model.config.hidden_size, 2, seed=0, number=0).requires_grad_(False)
        like = recipe.blank(base, names, head)
        adapter, accuracy, nll = recipe.train(base, data, like, head, seed=10 + number)
        print(f"{task}: accuracy {accuracy:.3f}, nll {nll:.4f}", file=sys.stderr)
        found[task] = Adapter(task, folder, "bottleneck", adapter.config, adapter.tensors)
    return found


def merged(some: list[Adapter], method: str) -> Adapter:
    return fuse(
        some,
        method=method,
        weights=[1 / len(some)] * len(some),
        reference=0,
        features="down+bias",
        metric="euclidean",
        solver=None,
        activations=None,
    ).adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=5)
    asked = parser.parse_args()
    base = load_model("minilm", Runtime.open("cpu", "float32"))
    results: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target = folder / "hotels.jsonl"
        target.write_text("".join(json.dumps(record) + "\n" for record in domain("hotels", late=True)[:352]))
        trained = pretrained(base, folder)
        config = FewShotOptions(few_shot=target, shots=asked.shots, seeds=asked.seeds)
        data = examples(config, seed=0)
        for kind, tasks in MERGES.items():
            some = [trained[task] for task in tasks]
            baselines = kind == "all"
            options = FewShotOptions(few_shot=target, shots=asked.shots, seeds=asked.seeds, baselines=baselines)
            study = Study(
                options, data, base.model, base.tokenizer, some, merged(some, "wts"), merged(some, "avg"), seed=0
            )
            started = time.perf_counter()
            found = run_few_shot(study, _Nowhere(), Quiet(), {})
            for entry in summarise(found):
                label = f"merged, {kind}" if entry["arm"] == "merged" else f"{entry['arm']} (of {kind})"
                results[label] = {k: v for k, v in entry.items() if k not in ("arm", "behind")}
                accuracy, nll = entry["accuracy"], entry["nll"]
                print(
                    f"{label}: accuracy {accuracy['mean']:.3f} ± {accuracy['deviation']:.3f}, ", end="", file=sys.stderr
                )
                print(f"nll {nll['mean']:.3f} ± {nll['deviation']:.3f}", file=sys.stderr)
            rows += [{"merge": kind, **row} for row in found]
            print(f"{kind}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    record = {
        "command": f"python tests/bench/mera_tracks.py --shots {asked.shots} --seeds {asked.seeds}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": platform.machine(), "threads": "1"},
        "versions": {
            "pomona": pomona.__version__,
            **{name: metadata.version(name) for name in ("torch", "transformers", "POT", "numpy")},
        },
        "target": {"task": "sentiment of hotels", "shots": asked.shots, "tests": len(data.draws[0].rest)},
        "merges": MERGES,
        "arms": results,
        "rows": rows,
    }
    path = Path(__file__).parent / "results/mera_tracks.json"
    path.write_text(json.dumps(record, indent=2) + "\n")


class _Nowhere:
    """A journal that keeps nothing."""

    def get(self, key: str) -> None:
        return None

    def append(self, key: str, value: Any) -> None:
        return None


if __name__ == "__main__":
    main()
