"""What merging adapters costs and gives, beside the packages that users have for it.

    python tests/bench/mera_merge.py [--part bottlenecks,lora,shipped] [--peers build/adapters] [--rounds 5] [--quick]

bottlenecks   Eight adapters of BERT base's size, r = 48, which are one adapter with its units in eight orders: what
              they compute is known, and a merge should compute it too. Transport on weights (`wts`), assignment and the
              plain average by us, `average_adapter` by `adapters`, and the whole command. Each in a process of its own,
              in turns: seconds and memory of the merge, from adapters in memory to an adapter in memory, and of all.
              `adapters` merges within a model, whose memory and seconds are therefore told apart. `wts, unrelated` are
              eight random adapters: no easier to match, and there is no truth to be near.
lora          LoRA in ΔW beside PEFT's `add_weighted_adapter`: told in mera_lora.py.
shipped       The adapters in data/: accuracy and negative log-likelihood on the sentences kept for testing, of each
              alone and of their merges, and the same from `adapters`, which loads what we wrote.

`adapters` has an environment of its own, whose Python POMONA_ADAPTERS_PYTHON names; without it, `--peers` says where to
find or to make one. Everything has one thread. Results go to results/mera_merge.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from processes import ROOT, Cost, interpreter, machine, surroundings, target, versions, watched

sys.path[:0] = [str(ROOT / "lib"), str(ROOT / "tests")]

import mera_lora as lora  # noqa: E402

from methods.mera_merge.adapterhub import make_bottleneck  # noqa: E402
from pomona.methods.mera_merge.adapters import Adapter, Bottleneck, read, with_sites, write  # noqa: E402

VARIABLE = "POMONA_ADAPTERS_PYTHON"
PINNED = ("torch==2.13.0", "adapters==1.3.0")
COPIES = 8
SIZES = {False: {"layers": 12, "width": 768, "rank": 48}, True: {"layers": 2, "width": 128, "rank": 16}}
SHIPPED = ("first", "second", "third")

Matrix = NDArray[np.float64]

# What is done within a process: `began` prints nothing, `lapped` the seconds since and the memory that was asked for.
LAPS = """
import json, re, sys, time
from pathlib import Path
laps, began = {}, time.perf_counter()
def status(name):
    return int(re.search(rf"{name}:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
def lap(name):
    global began
    laps[name] = time.perf_counter() - began
    began = time.perf_counter()
def merging():
    global before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
def merged():
    laps["merge_mb"] = status("VmHWM") - before
"""
OURS = """
import ot, scipy.optimize, torch
from pomona.methods.mera_merge.adapters import read, write
from pomona.methods.mera_merge.fusion import fuse
folder, out, method = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
lap("start")
adapters = [read(str(path), allow_pickle=False) for path in sorted(folder.iterdir())]
lap("read")
merging()
fused = fuse(adapters, method=method, weights=[1 / len(adapters)] * len(adapters), reference=0, features="down+bias",
             metric="euclidean", solver=None, activations=None)
lap("merge")
merged()
write(out, fused.adapter)
lap("write")
print(json.dumps(laps))
"""
AVERAGE = """
import torch
from adapters import BertAdapterModel
from transformers import BertConfig
folder, out, size = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
lap("start")
torch.set_grad_enabled(False)
heads = {"num_attention_heads": size["width"] // 64, "intermediate_size": 4 * size["width"]}
model = BertAdapterModel(BertConfig(hidden_size=size["width"], num_hidden_layers=size["layers"], **heads))
lap("base")
names = [model.load_adapter(str(path), load_as=path.name, use_safetensors=True) for path in sorted(folder.iterdir())]
lap("read")
merging()
model.average_adapter("task", names)
lap("merge")
merged()
model.save_adapter(str(out), "task", use_safetensors=True)
lap("write")
print(json.dumps(laps))
"""
JUDGE = """
import json, sys, torch
from adapters import AutoAdapterModel
from safetensors.torch import load_file
base, folder, singles, others = sys.argv[1], sys.argv[2], sys.argv[3].split(","), sys.argv[4].split(",")
torch.set_grad_enabled(False)
model = AutoAdapterModel.from_pretrained(base).eval()
for name in (*singles, *others):
    model.load_adapter(f"{folder}/{name}", load_as=name, use_safetensors=True)
model.average_adapter("average_adapter", singles)
batch = load_file(f"{folder}/batch.safetensors")
labels, found = batch.pop("labels"), {}
for name in (*singles, *others, "average_adapter"):
    model.set_active_adapters(name)
    model.active_head = singles[0]
    logits = model.eval()(**batch).logits.double()
    loss = torch.nn.functional.cross_entropy(logits, labels)
    found[name] = {"accuracy": float((logits.argmax(-1) == labels).double().mean()), "nll": float(loss)}
print(json.dumps(found))
"""


# --- one bottleneck in eight orders ----------------------------------------------------------------------------------


def bottlenecks(python: Path, rounds: int, *, quick: bool) -> dict[str, Any]:
    """Every contender in processes of its own, in turns; the first turn of each is not counted but checked."""
    size = SIZES[quick]
    ours = surroundings(ROOT / "lib", ROOT / "cli", threads=1)
    theirs = surroundings(threads=1)
    with tempfile.TemporaryDirectory(prefix="mera-") as name:
        folder = Path(name)
        original = _in_orders(folder / "copies", size)
        for seed in range(COPIES):
            make_bottleneck(folder / "unrelated" / f"a{seed}", seed=seed, **size)
        copies, out = folder / "copies", folder / "out"
        paths = sorted(copies.iterdir())
        here = [sys.executable, "-c", LAPS + OURS]
        commands: dict[str, list[object]] = {
            "wts": [*here, copies, out, "wts"],
            "assign": [*here, copies, out, "assign"],
            "avg": [*here, copies, out, "avg"],
            "wts, unrelated": [*here, folder / "unrelated", out, "wts"],
            "command": [sys.executable, "-m", "pomona_cli", "mera-merge", *paths, "--quiet", "-o", out],
            "average_adapter": [python, "-c", LAPS + AVERAGE, copies, out, json.dumps(size)],
        }
        costs: dict[str, list[Cost]] = {contender: [] for contender in commands}
        errors: dict[str, dict[str, float]] = {}
        averages: dict[str, Adapter] = {}
        for turn in range(rounds + 1):
            for contender, command in commands.items():
                cost = watched(command, theirs if contender == "average_adapter" else ours)
                if turn:
                    costs[contender].append(cost)
                elif contender != "wts, unrelated":
                    averages[contender] = read(str(out), allow_pickle=False)
                    errors[contender] = {"error": _error(averages[contender], original)}
                _remove(out)
        apart = _apart(averages["avg"], averages["average_adapter"])
    told = {contender: _told(each) | errors.get(contender, {}) for contender, each in costs.items()}
    return {
        "size": {"adapters": COPIES, **size},
        "rounds": rounds,
        "contenders": told,
        "avg from average_adapter": apart,
        "targets": {
            "merge of 8, seconds": target(told["wts"]["merge"], 2.0),
            "the process that merges, MB": target(told["wts"]["peak_mb"], 500.0),
            "wts gives the adapter back": target(told["wts"]["error"], 1e-6),
        },
    }


def _in_orders(folder: Path, size: Mapping[str, Any]) -> Adapter:
    """Write one adapter with its units in `COPIES` orders, the first its own."""
    original = read(str(make_bottleneck(folder / "a0", seed=0, **size)), allow_pickle=False)
    random = torch.Generator().manual_seed(1)
    for number in range(1, COPIES):
        sites = {}
        for name, site in original.sites().items():
            order = torch.randperm(len(site.down), generator=random)
            up = site.up[:, order].contiguous()
            sites[name] = Bottleneck(site.down[order], site.down_bias[order], up, site.up_bias)
        write(folder / f"a{number}", with_sites(original, sites, "copy"))
    return original


def _error(found: Adapter, truth: Adapter) -> float:
    """Relative distance between the outputs of two adapters at the worst site, on Gaussian input, in float64."""
    x = np.random.default_rng(0).standard_normal((256, next(iter(truth.sites().values())).down.shape[1]))

    def output(site: Bottleneck) -> Matrix:
        down, down_bias, up, up_bias = (np.asarray(part, np.float64) for part in vars(site).values())
        return np.maximum(x @ down.T + down_bias, 0) @ up.T + up_bias

    pairs = [(output(found.sites()[name]), output(site)) for name, site in truth.sites().items()]
    return float(max(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) for ours, theirs in pairs))


def _apart(one: Adapter, other: Adapter) -> float:
    """The largest difference between any two numbers."""
    pairs = [(vars(site), vars(other.sites()[name])) for name, site in one.sites().items()]
    return max(float((left[part] - right[part]).abs().max()) for left, right in pairs for part in left)


def _told(costs: Sequence[Cost]) -> dict[str, Any]:
    laps = [json.loads(cost.out.splitlines()[-1]) for cost in costs]
    phases = [name for name, value in laps[0].items() if isinstance(value, float)]
    found: dict[str, Any] = {name: round(statistics.median(lap[name] for lap in laps), 4) for name in phases}
    if "merge" in found:
        found["merge_range"] = [round(f(lap["merge"] for lap in laps), 4) for f in (min, max)]
    walls = [cost.wall for cost in costs]
    found |= {"all": round(statistics.median(walls), 3), "all_range": [round(f(walls), 3) for f in (min, max)]}
    return found | {"peak_mb": round(statistics.median(cost.peak_mb for cost in costs), 1)}


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


# --- the adapters in data/ -------------------------------------------------------------------------------------------


def shipped(python: Path) -> dict[str, Any]:
    """Accuracy and negative log-likelihood, as we measure them and as `adapters` does."""
    from safetensors.torch import save_file

    from methods.mera_merge import shipped as material
    from pomona.models.embedded import minilm

    singles = material.adapters()
    every = dict(zip(SHIPPED, singles, strict=True))
    every |= {method: material.merged(method, *singles) for method in ("avg", "wts", "acts")}
    found = {}
    with tempfile.TemporaryDirectory(prefix="mera-") as name:
        folder = Path(name)
        for label, adapter in every.items():
            accuracy, nll = material.judge(adapter)
            found[label] = {"accuracy": accuracy, "nll": nll}
            headed = dataclasses.replace(adapter, head=singles[0].head, head_config=singles[0].head_config)
            write(folder / label, headed)
        labels = torch.tensor(material.sentences().labels[material.TRAIN :])
        batch = {**material.inputs().batch(range(len(material.inputs()))), "labels": labels}
        save_file(batch, folder / "batch.safetensors")
        merged = ",".join(label for label in every if label not in SHIPPED)
        command = [python, "-c", JUDGE, minilm(), folder, ",".join(SHIPPED), merged]
        theirs = json.loads(watched(command, surroundings(threads=1)).out.splitlines()[-1])
    average = found["avg"]["nll"]
    return {
        "sentences": len(labels),
        "ours": found,
        "by adapters": theirs,
        "targets": {
            f"{method}: NLL over the average's": target(found[method]["nll"] / average, 0.1)
            for method in ("wts", "acts")
        },
    }


# --- all -------------------------------------------------------------------------------------------------------------


def show(part: str, found: Mapping[str, Any]) -> None:
    """The tables, in Markdown."""
    if part == "bottlenecks":
        names = ("merge", "merge_mb", "read", "base", "all", "peak_mb", "error")
        print("\n| bottlenecks | merge s | merge MB | read s | base s | all s | peak MB | error |\n|" + "---|" * 8)
        for name, each in found["contenders"].items():
            cells = [f"{each[key]:.3g}" if key in each else "" for key in names]
            print(f"| {name} | {' | '.join(cells)} |")
    elif part == "lora":
        lora.show(found)
    else:
        print("\n| adapter | accuracy | NLL | by adapters: accuracy | NLL |\n|" + "---|" * 5)
        for name, theirs in found["by adapters"].items():
            both = (found["ours"].get(name), theirs)
            cells = [f"{each[key]:.4f}" if each else "" for each in both for key in ("accuracy", "nll")]
            print(f"| {name} | {' | '.join(cells)} |")
    for name, one in found["targets"].items():
        print(f"\n{name}: {one}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="bottlenecks,lora,shipped", help="what to run; other results are kept")
    parser.add_argument("--peers", type=Path, default=Path("build/adapters"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small adapters; writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    python = interpreter(VARIABLE, options.peers, PINNED)
    path = ROOT / "tests/bench/results/mera_merge.json"
    result: dict[str, Any] = dict.fromkeys(("bottlenecks", "lora", "shipped"), "not run")
    result |= json.loads(path.read_text()) if path.exists() else {}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "bottlenecks": lambda: bottlenecks(python, options.rounds, quick=options.quick),
        "lora": lambda: lora.merges(options.rounds, quick=options.quick),
        "shipped": lambda: shipped(python),
    }
    for part in options.part.split(","):
        if part not in parts:
            parser.error(f"--part {part}: {', '.join(parts)}")
        before = os.getloadavg()[0]
        found = parts[part]()
        show(part, found)
        about = {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d")}
        names = ("torch", "peft", "numpy") if part == "lora" else ("torch", "adapters", "transformers")
        about |= {"versions": versions(Path(sys.executable) if part == "lora" else python, names)}
        result[part] = about | {"machine": machine(before), **found}
        if not options.quick:
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
