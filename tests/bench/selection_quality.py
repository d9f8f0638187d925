"""Do the scores mean anything? How well they tell records that Claude rated 4.5 or better from the others.

    python tests/bench/selection_quality.py [--per-group 300] [--seed 0]

A seeded sample of Alpaca's random subset (``POMONA_SHARED``/data/alpaca/random_9k.json): records that are in
claude_t45.json, matched on instruction, input and answer, and as many that are not. The real commands score them with
the embedded model. For each score the AUC is the chance that a record of the first group has the better score than one
of the second, ties counting half; which end is the better one was fixed beforehand. The 95 % interval is that of 2,000
bootstrap resamples within the groups (percentiles). Results go to results/selection_quality.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

import pomona

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("POMONA_SHARED", ROOT.parent / "shared"))
RESAMPLES = 2000
KEEP = "10%"

Floats = NDArray[np.float64]


def triplet(record: dict[str, str]) -> tuple[str, str, str]:
    return record["instruction"], record.get("input", ""), record["output"]


def sample(per_group: int, seed: int) -> list[dict[str, Any]]:
    """Records in the order of the file, each with its place there as `id` and its group as `good`."""
    everything = json.loads((SHARED / "data/alpaca/random_9k.json").read_text())
    rated = {triplet(record) for record in json.loads((SHARED / "data/alpaca/claude_t45.json").read_text())}
    groups: dict[bool, list[int]] = {True: [], False: []}
    for place, record in enumerate(everything):
        groups[triplet(record) in rated].append(place)
    rng = random.Random(seed)
    chosen = {place: good for good in (True, False) for place in rng.sample(groups[good], per_group)}
    return [{"id": place, "good": chosen[place], **everything[place]} for place in sorted(chosen)]


def pomona_run(folder: Path, *args: str) -> tuple[dict[str, Any], list[dict[str, Any]], float]:
    """Summary, output records and seconds of one command; records without a score go to rejects."""
    name = f"{len(list(folder.glob('out*.jsonl')))}.jsonl"
    started = time.perf_counter()
    line = [sys.executable, "-m", "pomona_cli", *args, "-o", f"out{name}", "--rejects", f"rejects{name}"]
    done = subprocess.run(line, cwd=folder, stdout=subprocess.PIPE, check=False)
    seconds = time.perf_counter() - started
    if done.returncode not in (0, 3):
        sys.exit(f"{' '.join(args)} ended with {done.returncode}")
    print(f"pomona {' '.join(args)}: {seconds:.0f} s", file=sys.stderr)
    return json.loads(done.stdout), [json.loads(s) for s in (folder / f"out{name}").read_text().splitlines()], seconds


def auc(good: Floats, other: Floats) -> float:
    """P(good > other) + P(good = other) / 2, from ranks; `good` is [n], `other` [m]."""
    ranks = rankdata(np.concatenate([good, other]))
    n, m = len(good), len(other)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def interval(good: Floats, other: Floats, rng: np.random.Generator) -> tuple[float, float]:
    """2.5th and 97.5th percentile of the AUC over resamples of both groups."""
    drawn = [auc(rng.choice(good, len(good)), rng.choice(other, len(other))) for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-group", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "selection_quality.json")
    args = parser.parse_args()
    if not (SHARED / "data/alpaca/claude_t45.json").is_file():
        sys.exit(f"skipped: {SHARED / 'data/alpaca'} is not here; set POMONA_SHARED to the folder of reference data")
    records = sample(args.per_group, args.seed)
    words = {r["id"]: len(r["output"].split()) for r in records}
    rng = np.random.default_rng(args.seed)

    scores: dict[str, tuple[dict[int, float], int]] = {}  # name -> scores by id, and +1 where higher is better, else -1
    kept: dict[str, Counter[bool]] = {}
    runs: list[dict[str, Any]] = []

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        def written(name: str, rows: list[dict[str, Any]]) -> str:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
            return name

        def run(*line: str) -> list[dict[str, Any]]:
            summary, out, seconds = pomona_run(folder, *line)
            told = {key: summary[key] for key in ("in", "out", "filtered", "rejected_by", "model") if key in summary}
            runs.append({"command": f"pomona {' '.join(line)}", "seconds": round(seconds, 1), **told})
            return out

        written("in.jsonl", records)
        for variant in ("superfilter", "cherry"):
            out = run("ifd-score", "in.jsonl", "--variant", variant)
            for field, better in (("ifd", 1), ("loss_cond", -1)):
                found = {r["id"]: r["ifd"][field] for r in out if r["ifd"][field] is not None}
                scores[f"{variant} {field}"] = found, better
            best = run("ifd-score", written("scored.jsonl", out), "--variant", variant, "--keep-top", KEEP)
            kept[f"{variant} ifd"] = Counter(r["good"] for r in best)
        out = run("alpagasus-filter", "in.jsonl", "--judge", "local", "--score", "expected", "--threshold", "0")
        expected = {r["id"]: r["alpagasus"]["score"] for r in out}
        scores["judge, expected accuracy"] = expected, 1
        ratings = written("ratings.jsonl", [{"id": key, "score": value} for key, value in expected.items()])
        best = run("alpagasus-filter", "in.jsonl", "--ratings", ratings, "--join", "id", "--top", KEEP)
        kept["judge, expected accuracy"] = Counter(r["good"] for r in best)
    scores["answer length in words"] = {key: float(n) for key, n in words.items()}, -1
    scores["a random number"] = {key: float(rng.random()) for key in words}, 1

    result: dict[str, Any] = {
        "command": " ".join(["python tests/bench/selection_quality.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": os.environ.get("POMONA_THREADS") or os.environ.get("OMP_NUM_THREADS") or os.cpu_count(),
        },
        "versions": {"pomona": pomona.__version__}
        | {name: metadata.version(name) for name in ("torch", "transformers", "numpy", "scipy")},
        "sample": {"per_group": args.per_group, "seed": args.seed},
        "interval": f"95 %, percentiles of {RESAMPLES} bootstrap resamples within the groups",
        "mean_words": {
            name: round(float(np.mean([words[r["id"]] for r in records if r["good"] is good])), 1)
            for name, good in (("claude_t45", True), ("rest", False))
        },
        "runs": runs,
        "scores": {},
    }
    print(f"\n{args.per_group} records that Claude rated 4.5 or better against {args.per_group} others")
    print(
        f"{'score':<26} {'better':<7} {'AUC':>6}  {'95 % interval':<15} {'no score':>8}  {'rho words':>10}  "
        f"top {KEEP} keeps"
    )
    for name, (by_id, better) in scores.items():
        good, other = (np.array([better * by_id[r["id"]] for r in records if r["good"] is g and r["id"] in by_id])
                       for g in (True, False))  # fmt: skip
        low, high = interval(good, other, rng)
        missing = len(records) - len(by_id)
        ids = list(by_id)
        entry: dict[str, Any] = {
            "better": "higher" if better > 0 else "lower",
            "auc": round(auc(good, other), 4),
            "interval": [round(low, 4), round(high, 4)],
            "without_score": missing,
            "spearman_with_words": round(
                float(spearmanr([by_id[i] for i in ids], [words[i] for i in ids]).statistic), 3
            ),
        }
        tail = ""
        if name in kept:
            share = {
                label: round(kept[name][g] / args.per_group, 4) for label, g in (("claude_t45", True), ("rest", False))
            }
            entry["kept_share"] = share
            tail = f"{share['claude_t45']:.1%} of claude_t45, {share['rest']:.1%} of the rest"
        result["scores"][name] = entry
        print(
            f"{name:<26} {entry['better']:<7} {entry['auc']:6.3f}  [{low:.3f}, {high:.3f}]  {missing:>8}  "
            f"{entry['spearman_with_words']:>10.3f}  {tail}"
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
