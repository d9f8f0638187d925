"""What MADAug is worth on real digits, as it is run from the command line.

    python tests/bench/madaug_digits.py [--seeds 6] [--rows ordinary,inverted,shifted] [--side 2]

scikit-learn's 8 x 8 digits, 200 to learn from, 200 to learn the policy on, 1,397 to test on, parted anew for every
seed; half of the last two inverted, or all of them shifted by -3 to 3 pixels in x, in a row each (`planted`). Columns:

none       no policy
random     a policy that knows nothing: all operations alike likely, magnitudes about the middle, the same curriculum
uniform    the same with magnitudes of every strength
as coded   images mixed in the inner step under running statistics, as in the released code
madaug     ours: losses mixed, statistics of the batch
train+val  random, learning from the 200 images of the policy as well

And transfer: the policies of the first three shifted runs, with their networks, frozen, on three other draws of shifted
digits with other initial weights. Test accuracies in percent, mean and standard deviation over seeds, after the last of
80 epochs. Results go to results/madaug_digits.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from processes import ROOT, machine, surroundings

PATH = ROOT / "tests/bench/results/madaug_digits.json"
COLUMNS = ("none", "random", "uniform", "as coded", "madaug", "train+val")
_AS_CODED = ("--relaxation", "image", "--inner-bn", "eval", "--compare", "nothing")
_SOURCES, _OTHERS = 3, 100  # policies that are transferred, and the first seed of what they are transferred to


def trained(images: Path, run: Path, seed: int, *options: str) -> dict[str, Any]:
    """What report.json says of a run of the command."""
    command = [sys.executable, "-m", "pomona_cli", "madaug-train", str(images), "-o", str(run), "-q"]
    told = ["--preset", "digits", "--seed", str(seed), "--device", "cpu", *options]
    around = surroundings(ROOT / "lib", ROOT / "cli", threads=1)
    subprocess.run([*command, *told], check=True, stdout=subprocess.DEVNULL, env=around)
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


def cell(folder: Path, row: str, seed: int) -> dict[str, Any]:
    """Every column of a row under one seed: test accuracy, and what the policies came to."""
    from methods.madaug_train import planted

    images = planted.write(folder / f"{row}-{seed}.npz", row, seed)
    ours = trained(images, folder / f"{row}-{seed}", seed, "--compare", "none,random,uniform,train+val")
    coded = trained(images, folder / f"{row}-{seed}-coded", seed, *_AS_CODED)
    found = {name: _percent(ours, name) for name in ours["accuracy"]} | {"as coded": _percent(coded, "madaug")}
    print(row, seed, found, file=sys.stderr, flush=True)
    return {"accuracy": found, "madaug": _policy(ours), "as coded": _policy(coded)}


def transfer(folder: Path, source: int, seed: int) -> dict[str, float]:
    """The policy of a shifted run on another draw of shifted digits, beside a random one."""
    from methods.madaug_train import planted

    images = planted.write(folder / f"other-{source}-{seed}.npz", "shifted", seed)
    policy = ("--policy", str(folder / f"shifted-{source}"), "--compare", "random")
    found = trained(images, folder / f"transfer-{source}-{seed}", seed, *policy)
    return {name: _percent(found, name) for name in ("transfer", "random")}


def _percent(found: Mapping[str, Any], name: str) -> float:
    return round(100 * found["accuracy"][name]["mean"], 2)


def _policy(found: Mapping[str, Any]) -> dict[str, Any]:
    """The choice at the end: the most likely operation, and how likely those are that were planted."""
    rows = {row["name"]: row for row in found["policy"]["operations"]}
    first = found["policy"]["operations"][0]
    return {
        "top": first["name"],
        **{
            name: round(rows[name]["probability"], 3) for name in dict.fromkeys((first["name"], "Invert", "TranslateX"))
        },
        "entropy": round(found["policy"]["entropy"][0], 3),
    }


def summed(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and deviations over the seeds of a row."""
    by_column = {name: [each["accuracy"][name] for each in cells] for name in COLUMNS}
    return {
        "accuracy": {
            name: {
                "mean": round(statistics.fmean(values), 2),
                "sd": round(statistics.stdev(values), 2) if len(values) > 1 else None,
                "by_seed": values,
            }
            for name, values in by_column.items()
        },
        "policy": {
            name: {
                "top": [each[name]["top"] for each in cells],
                **{part: round(statistics.fmean(each[name][part] for each in cells), 3) for part in _PLANTED},
                "entropy": [each[name]["entropy"] for each in cells],
            }
            for name in ("madaug", "as coded")
        },
    }


_PLANTED = ("Invert", "TranslateX")


def show(result: Mapping[str, Any]) -> None:
    """The table, in Markdown."""
    print(f"| digits | {' | '.join(COLUMNS)} | policy |\n|{'---|' * (len(COLUMNS) + 2)}")
    for row, found in result["rows"].items():
        cells = [f"{each['mean']:.1f} ± {each['sd'] or 0:.1f}" for each in found["accuracy"].values()]
        learned = found["policy"]["madaug"]
        print(f"| {row} | {' | '.join(cells)} | {', '.join(f'{name} {learned[name]:.2f}' for name in _PLANTED)} |")
    if "transfer" in result:
        print(f"\ntransfer: {result['transfer']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--rows", default="ordinary,inverted,shifted")
    parser.add_argument("--side", type=int, default=2, help="runs side by side, of one thread each")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT / "lib"), str(ROOT / "tests")]
    import torch

    before, began = os.getloadavg()[0], time.monotonic()
    rows = options.rows.split(",")
    result: dict[str, Any] = {"rows": {}}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.side) as pool:
        folder = Path(name)
        cells = {row: [pool.submit(cell, folder, row, seed) for seed in range(options.seeds)] for row in rows}
        for row, waiting in cells.items():
            result["rows"][row] = summed([each.result() for each in waiting])
        if "shifted" in rows and options.seeds >= _SOURCES:
            pairs = [(source, _OTHERS + other) for source in range(_SOURCES) for other in range(_SOURCES)]
            found = list(pool.map(lambda pair: transfer(folder, *pair), pairs))
            gains = [round(each["transfer"] - each["random"], 2) for each in found]
            means = {who: round(statistics.fmean(each[who] for each in found), 2) for who in found[0]}
            result["transfer"] = {**means, "gains": gains, "better": sum(gain > 0 for gain in gains)}
    show(result)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(before),
        "versions": {name: metadata.version(name) for name in ("torch", "scikit-learn")},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "minutes": round((time.monotonic() - began) / 60, 1),
        **result,
    }
    PATH.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
