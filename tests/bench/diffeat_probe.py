"""What a probe costs when features are read once, and fitted by a solver that knows what it is given.

    python tests/bench/diffeat_probe.py [--part probe,fits] [--rounds 3] [--quick]

Real digits, the embedded model, time 50, the first residual block of the decoder at 4 x 4, noise keyed by image.
Of `probe`: a linear head by the released recipe (SGD for 28 epochs) on the images to learn from, then all test images:

rerun      every batch of every epoch through the whole U-Net with a hook on the block, as the released code has it
truncated  the same through `Truncated`, which ends at the block
cached     features of all images by `Truncated` once, then the epochs on what is kept
logistic   `logistic` on the same features, in place of SGD

The first three see the same noise and the same batches; times are printed only where their accuracies are equal.
Of `fits`: one fit of 1 and 10 labels a class and of all, on pixels and on features of more and more columns:

ours       `logistic`
plain      scikit-learn's StandardScaler and LogisticRegression as they come (lbfgs, tolerance 1e-4)
tight      the same with tolerance 1e-6, which is what brings it to its own optimum

with how many of 899 answers each gives that differ from those of tolerance 1e-9. Seconds are of the processor on one
thread, contenders in turns; medians and extremes over the rounds. Results go to results/diffeat_probe.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

from processes import ROOT, machine

PATH = ROOT / "tests/bench/results/diffeat_probe.json"
TIME, BLOCK, POOL = 50, "u0r0", 4
EPOCHS, BATCH, RATE = 28, 32, 0.05
PENALTY = 0.1
BATCHES_READ = 64  # images in a pass where they are read once

Work = Callable[[], Any]


class Digits:
    """The images with their noise, the network, and the halves."""

    def __init__(self) -> None:
        import numpy as np
        import torch
        from sklearn.datasets import load_digits

        from pomona.methods.diffeat_extract.extraction import as_input
        from pomona.methods.diffeat_extract.noising import noise, noised, schedule
        from pomona.methods.diffeat_extract.probing.splits import task
        from pomona.models.unets.blocks import blocks, resolve
        from pomona.models.unets.loading import load_unet
        from pomona.models.unets.truncated import Truncated

        images, labels = load_digits(return_X_y=True)
        pixels = np.rint(images * 255 / 16).astype(np.uint8)
        splits = np.full(len(images), "test", dtype=object)
        splits[np.random.default_rng(0).permutation(len(images))[:898]] = "train"
        self.pixels = pixels.astype(np.float32)
        self.task = task(labels.tolist(), splits.tolist(), test_share=0.5, seed=0)
        self.unet = load_unet("digits", dtype=torch.float32, device="cpu")
        self.table = blocks(self.unet.module, 8)
        self.block = resolve([BLOCK], self.table)[0]
        self.truncated = Truncated(self.unet.module, [self.block.number])
        alpha_bar = schedule("model", self.unet.scheduler).alpha_bars[TIME]
        clean = as_input(pixels.reshape(-1, 8, 8, 1))
        eps = torch.stack([noise(0, f"digit-{place:04d}", TIME, 0, 0, (1, 8, 8)) for place in range(len(images))])
        self.noisy = noised(clean, alpha_bar, eps)

    def by_truncated(self, rows: Any) -> Any:
        """Features of the images at `rows`."""
        import torch

        with torch.inference_mode():
            return _pooled(self.truncated(self.noisy[rows], torch.full((len(rows),), TIME))[0])

    def by_hook(self, rows: Any) -> Any:
        """The same from the whole pass."""
        import torch

        found: list[Any] = []
        resnet = self.unet.module.up_blocks[0].resnets[0]
        handle = resnet.register_forward_hook(lambda _, __, output: found.append(output))
        with torch.inference_mode():
            self.unet.module(self.noisy[rows], torch.full((len(rows),), TIME))
        handle.remove()
        return _pooled(found[0])

    def all_features(self) -> Any:
        import torch

        places = torch.arange(len(self.noisy))
        return torch.cat([self.by_truncated(rows) for rows in places.split(BATCHES_READ)])


def _pooled(maps: Any) -> Any:
    import torch

    return torch.nn.functional.adaptive_avg_pool2d(maps, POOL).flatten(1)


def probe(digits: Digits, rounds: int, epochs: int) -> dict[str, Any]:
    """Accuracy and seconds of each contender, from noisy images to answers about the test images."""
    from pomona.methods.diffeat_extract.heads import learning, modules
    from pomona.methods.diffeat_extract.probing.logistic import logistic
    from pomona.runtime.progress import Quiet

    train, test, labels = digits.task.train, digits.task.test, digits.task.labels
    dims = digits.block.channels * POOL**2

    def sgd(features: Callable[[Any], Any]) -> float:
        head = modules.linear(dims, len(digits.task.names), seed=0)
        given = lambda rows: (features(rows).clone(),)  # noqa: E731
        learning.learn(head, given, labels, train, epochs=epochs, batch=BATCH, rate=RATE, seed=0, progress=Quiet())
        return float((learning.predict(head, given, test, batch=BATCHES_READ) == labels[test]).mean())

    def cached() -> float:
        kept = digits.all_features()
        return sgd(lambda rows: kept[rows])

    def fitted() -> float:
        kept = digits.all_features().numpy()
        return float((logistic(kept[train], labels[train], kept[test], penalty=PENALTY) == labels[test]).mean())

    work: dict[str, Callable[[], float]] = {
        "rerun": lambda: sgd(digits.by_hook),
        "truncated": lambda: sgd(digits.by_truncated),
        "cached": cached,
        "logistic": fitted,
    }
    accuracy, seconds = _turns(work, rounds)
    if len({accuracy[name] for name in ("rerun", "truncated", "cached")}) > 1:
        raise SystemExit(f"the accuracies differ, so times cannot be compared: {accuracy}")
    return {
        "images": {"train": len(train), "test": len(test)},
        "epochs": epochs,
        "columns": dims,
        "flop_ratio": round(1 / digits.block.share, 3),
        "accuracy": {name: round(value, 4) for name, value in accuracy.items()},
        **_times(seconds, "rerun"),
    }


def fits(digits: Digits, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of one fit with its answers, by columns and labelled images."""

    from pomona.methods.diffeat_extract.probing.logistic import logistic
    from pomona.methods.diffeat_extract.probing.splits import draws

    test, labels = digits.task.test, digits.task.labels
    maps = digits.all_features().numpy().reshape(len(labels), digits.block.channels, POOL, POOL)
    halves = maps.reshape(*maps.shape[:2], 2, 2, 2, 2).mean(axis=(3, 5))
    wide = [digits.pixels, maps.mean(axis=(2, 3)), halves.reshape(len(labels), -1), maps.reshape(len(labels), -1)]
    names = ["pixels", *(f"{BLOCK}, pool {pool}" for pool in (1, 2, 4))]
    places = []
    for name, features in zip(names, wide, strict=True):
        for shots in (1, 10, None):
            rows = draws(digits.task, shots, 1, seed=0)[0]
            given = features[rows], labels[rows], features[test]
            work: dict[str, Work] = {
                "ours": lambda given=given: logistic(*given, penalty=PENALTY),
                "plain": lambda given=given: _plain(*given, tolerance=1e-4),
                "tight": lambda given=given: _plain(*given, tolerance=1e-6),
            }
            answers, seconds = _turns(work, rounds)
            optimum = _plain(*given, tolerance=1e-9)
            places.append(
                {
                    "features": name,
                    "columns": features.shape[1],
                    "labels a class": "all" if shots is None else shots,
                    "images": len(rows),
                    "accuracy": {
                        each: round(float((said == labels[test]).mean()), 4) for each, said in answers.items()
                    },
                    "differ": {each: int((said != optimum).sum()) for each, said in answers.items()},
                    **_times(seconds, "ours"),
                }
            )
            print(name, shots, file=sys.stderr)
    return places


def _plain(train: Any, labels: Any, test: Any, *, tolerance: float) -> Any:
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train.astype(np.float64))
    model = LogisticRegression(C=PENALTY, max_iter=10_000, tol=tolerance)
    model.fit(scaler.transform(train.astype(np.float64)), labels)
    return model.predict(scaler.transform(test.astype(np.float64)))


def _turns(work: Mapping[str, Work], rounds: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """What each contender gives, and its seconds in every round; what takes little is done several times in each."""
    found, times = {}, {}
    for name, each in work.items():
        begin = time.process_time()
        found[name] = each()
        times[name] = max(1, int(0.03 / max(1e-6, time.process_time() - begin)))
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, each in work.items():
            begin = time.process_time()
            for _ in range(times[name]):
                each()
            seconds[name].append((time.process_time() - begin) / times[name])
    return found, seconds


def _times(seconds: Mapping[str, Sequence[float]], beside: str) -> dict[str, Any]:
    median = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "ms": {name: round(1000 * value, 3) for name, value in median.items()},
        "ms_range": {name: [round(1000 * f(each), 3) for f in (min, max)] for name, each in seconds.items()},
        f"times_{beside}": {name: round(value / median[beside], 3) for name, value in median.items()},
    }


def targets(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was asked, and the figures that decide it."""
    told: dict[str, dict[str, Any]] = {}
    if "probe" in found:
        ms, accuracy = found["probe"]["ms"], found["probe"]["accuracy"]
        told["cached beside the network in every epoch, accuracy equal"] = {
            "times faster": round(ms["rerun"] / ms["cached"], 1),
            "accuracy": [accuracy["rerun"], accuracy["cached"]],
            "met": accuracy["rerun"] == accuracy["cached"] and ms["cached"] < ms["rerun"],
        }
    if "fits" in found:
        few = [place["times_ours"] for place in found["fits"] if place["labels a class"] != "all"]
        told["a fit of 1 or 10 labels a class beside plain scikit-learn"] = {
            "times faster": [round(f(place["plain"] for place in few), 1) for f in (min, max)],
            "answers that differ from the optimum's": {
                name: sum(place["differ"][name] for place in found["fits"]) for name in ("ours", "plain", "tight")
            },
        }
    return told


def show(found: Mapping[str, Any]) -> None:
    """The tables, in Markdown."""
    if "probe" in found:
        print("| contender | accuracy | seconds | beside the network in every epoch |\n|" + "---|" * 4)
        place = found["probe"]
        for name, ms in place["ms"].items():
            print(f"| {name} | {place['accuracy'][name]} | {ms / 1000:.3f} | {1 / place['times_rerun'][name]:.1f}x |")
    if "fits" in found:
        print("\n| features | columns | images | ours ms | plain | tight | answers off |\n|" + "---|" * 7)
        for place in found["fits"]:
            ratios = [f"{place['times_ours'][name]:.1f}x" for name in ("plain", "tight")]
            off = " ".join(str(count) for count in place["differ"].values())
            cells = (place["features"], place["columns"], place["images"], place["ms"]["ours"], *ratios, off)
            print(f"| {' | '.join(map(str, cells))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="probe,fits", help="what to run; other results are kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two epochs, one round; writes nothing")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "lib"))
    import torch

    from pomona.runtime.jobs import one_thread

    result: dict[str, Any] = json.loads(PATH.read_text()) if PATH.exists() else {}
    rounds = 1 if options.quick else options.rounds
    for part in options.part.split(","):
        if part not in ("probe", "fits"):
            parser.error(f"--part {part}: probe, fits")
        before = os.getloadavg()[0]
        with one_thread():
            digits = Digits()
            if part == "probe":
                found: dict[str, Any] = {part: probe(digits, rounds, 2 if options.quick else EPOCHS)}
            else:
                found = {part: fits(digits, rounds)}
        show(found)
        for name, target in targets(found).items():
            print(f"\n{name}: {target}\n")
        result[part] = {
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(before),
            "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "scikit-learn", "scipy")},
            "capability": torch.backends.cpu.get_cpu_capability(),
            "targets": targets(found),
            **(found if part == "fits" else found[part]),
        }
        if not options.quick:
            PATH.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
