"""What it costs to augment a batch whose every image has operations and magnitudes of its own.

    python tests/bench/madaug_augment.py [--size 32,96,224] [--batch 16,128,512] [--rounds 5] [--channels 3]
                                         [--device cpu] [--quick]

Two of the 17 operations in each image, drawn alike for all contenders, which take turns in one process:

pillow      image by image, as the released code does it: `by_pillow.augmented`
groups      batches sorted by operation: 17 calls in each slot, of the same kernels
fused       batches sorted by kind: five kernels in each slot: `batched.augmented`
kornia      its RandAugment(2), which draws two operations for the whole batch: not the same job, and no policy's

and then all 17 of every image, as a policy step takes them: `pillow all`, `fused all`. Before anything is timed, what
they give is compared with Pillow's, pixel by pixel. Images are crops of two photographs that scikit-learn ships.
Seconds are of the processor on one thread, since the machine may not be ours alone, and of the wall clock on a GPU;
medians and extremes over the rounds. 512 images are of 32 pixels alone. Results go to results/madaug_augment.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from processes import ROOT, machine

PATH = ROOT / "tests/bench/results/madaug_augment.json"
SHORTEST = 0.02  # seconds that a round of a contender takes at least
LARGEST = 64_000_000  # levels in all 17 copies of a batch, above which they are left out

Work = Callable[[], Any]


def photographs(batch: int, channels: int, size: int) -> Any:
    """Crops (B, C, H, W), uint8."""
    import numpy as np
    import torch
    from sklearn.datasets import load_sample_images

    pictures, random = load_sample_images().images, np.random.default_rng(0)
    found = np.empty((batch, channels, size, size), np.uint8)
    for row in range(batch):
        picture = pictures[row % 2]
        top, left = (random.integers(0, extent - size + 1) for extent in picture.shape[:2])
        found[row] = picture[top : top + size, left : left + size].transpose(2, 0, 1)[:channels]
    return torch.from_numpy(found)


def contenders(size: int, batch: int, options: argparse.Namespace) -> tuple[dict[str, Work], dict[str, int]]:
    """What each does, and how far what it gives is from Pillow's at most, of 255."""
    import numpy as np
    import torch
    from kornia.augmentation.auto import RandAugment

    from pomona.methods.madaug_train.operations import batched, by_pillow
    from pomona.methods.madaug_train.operations.batched import Chain
    from pomona.methods.madaug_train.operations.table import OPERATIONS

    random = np.random.default_rng(1)
    images = photographs(batch, options.channels, size).to(options.device)
    count = len(OPERATIONS)
    places = torch.from_numpy(random.random((batch, count)).argsort(1)[:, :2].copy())

    def draws(k: int) -> tuple[Any, Any, Any]:
        magnitudes, mirrored = random.random((batch, k), np.float32), random.random((batch, k)) < 0.5
        return tuple(map(torch.from_numpy, (magnitudes, mirrored, random.random((batch, k, 2), np.float32))))

    chain, of_all = Chain(places, *draws(2)), draws(count)

    def groups() -> Any:
        found = images.clone()
        for slot in range(2):
            for place in range(count):
                rows = (places[:, slot] == place).nonzero()[:, 0]
                if len(rows):
                    own = (each[rows, slot : slot + 1] for each in vars(chain).values())
                    found[rows] = batched.augmented(found[rows], OPERATIONS, Chain(*own))
        return found

    work: dict[str, Work] = {
        "pillow": lambda: by_pillow.augmented(images, OPERATIONS, chain),
        "groups": groups,
        "fused": lambda: batched.augmented(images, OPERATIONS, chain),
    }
    if options.channels == 3:
        rand_augment, floats = RandAugment(n=2, m=10), images.float() / 255
        work["kornia"] = lambda: rand_augment(floats)
    if count * images.numel() <= LARGEST:
        work["pillow all"] = lambda: by_pillow.every(images, OPERATIONS, *of_all)
        work["fused all"] = lambda: batched.every(images, OPERATIONS, *of_all)
    differences = {
        name: int((work[name]().int() - work["pillow all" if "all" in name else "pillow"]().int()).abs().max())
        for name in work
        if name not in ("pillow", "pillow all", "kornia")
    }
    if any(differences.values()):
        raise SystemExit(f"not Pillow's pixels: {differences}")
    return work, differences


def place(size: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One size of images and batches: images a second, and operations a second where there are all 17."""
    import torch

    work, differences = contenders(size, batch, options)
    torch.manual_seed(0)
    clock = time.process_time if options.device == "cpu" else _after_all
    repeats = {}
    for name, each in work.items():
        begin = clock()
        each()
        repeats[name] = max(1, round(SHORTEST / max(clock() - begin, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(options.rounds):
        for name, each in work.items():
            begin = clock()
            for _ in range(repeats[name]):
                each()
            seconds[name].append((clock() - begin) / repeats[name])
    rates = {name: batch * (17 if "all" in name else 1) / statistics.median(each) for name, each in seconds.items()}
    return {
        "size": size,
        "batch": batch,
        "channels": options.channels,
        "ms": {name: round(1000 * statistics.median(each), 4) for name, each in seconds.items()},
        "ms_range": {name: [round(1000 * f(each), 4) for f in (min, max)] for name, each in seconds.items()},
        "a_second": {name: round(rate) for name, rate in rates.items()},
        "times_pillow": {
            name: round(rate / rates["pillow all" if "all" in name else "pillow"], 2) for name, rate in rates.items()
        },
        "max_abs": differences,
    }


def _after_all() -> float:
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def targets(places: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was asked, the figure that decides it, and whether it holds."""
    told: dict[str, dict[str, Any]] = {}
    for found in places:
        if (found["size"], found["batch"]) == (32, 128):
            for name, asked in (("fused", 2.0), ("fused all", 4.0)):
                figure = found["times_pillow"][name]
                told[f"32 px, batch 128: {name} beside Pillow"] = {
                    "figure": figure,
                    "asked": asked,
                    "met": figure >= asked,
                }
    return told


def show(result: Mapping[str, Any]) -> None:
    """The table, in Markdown."""
    print("| pixels | batch | contender | images or operations a second | beside Pillow | max abs |\n|" + "---|" * 6)
    for found in result["places"]:
        for name, rate in found["a_second"].items():
            marked = f"{name} (not the same job)" if name == "kornia" else name
            ratio = f"{found['times_pillow'][name]:.2f}x"
            cells = (found["size"], found["batch"], marked, f"{rate:,}", ratio, found["max_abs"].get(name, ""))
            print(f"| {' | '.join(map(str, cells))} |")


def race(options: argparse.Namespace) -> dict[str, Any]:
    """All sizes and batches."""
    import torch

    torch.set_num_threads(1)
    places = []
    with torch.inference_mode():
        for size in map(int, options.size.split(",")):
            for batch in map(int, options.batch.split(",")):
                if batch <= 128 or size <= 32:
                    places.append(place(size, batch, options))
                    print(size, batch, file=sys.stderr)
    return {
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "threads": 1,
        "clock": "processor" if options.device == "cpu" else "wall",
        "versions": {name: metadata.version(name) for name in ("torch", "pillow", "kornia")},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "targets": targets(places),
        "places": places,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="32,96,224", help="pixels, by comma")
    parser.add_argument("--batch", default="16,128,512", help="images, by comma")
    parser.add_argument("--channels", type=int, default=3, help="3, or 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="32 pixels, batches of 16; writes nothing")
    options = parser.parse_args()
    if options.quick:
        options.size, options.batch = "32", "16"
    sys.path.insert(0, str(ROOT / "lib"))
    result: dict[str, Any] = json.loads(PATH.read_text()) if PATH.exists() else {}
    before = os.getloadavg()[0]
    found = race(options)
    show(found)
    for name, target in found["targets"].items():
        print(f"\n{name}: {target}")
    about = {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d")}
    name = f"{'colour' if options.channels == 3 else 'grey'}{'' if options.device == 'cpu' else ' ' + options.device}"
    result[name] = about | {"machine": machine(before), **found}
    if not options.quick:
        PATH.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
