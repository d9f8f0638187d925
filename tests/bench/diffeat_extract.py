"""What features cost when nothing is computed that nobody asked for.

    python tests/bench/diffeat_extract.py [--part features] [--network cifar,adm] [--device cpu] [--batch 8]
                                          [--rounds 7] [--threads 1] [--quick]

Of `features`: one batch through a U-Net of random weights, its map pooled to 2 x 2, all contenders on the same weights,
images and times, taking turns in one process:

hooks       the whole pass of diffusers with a forward hook on the block: what one does without this command
truncated   `Truncated`, which ends at the block
compiled    the same by torch.compile
bfloat16    all three in that format

`cifar` is the DDPM of Ho et al. 2020 on CIFAR-10 (35.7 million parameters) at its middle, block 13, and at block 19;
`adm` is ADM-256 at block 24, which takes a GPU. A time is printed only of what agrees: in one format truncated features
are those of the hook to the bit, compiled ones within rounding, and bfloat16 is within 5 % of float32 (L2 over all
features). FLOPs of products stand beside the times. Seconds are of the processor on one thread, since the machine may
not be ours alone, and of the wall clock with more or on a GPU; medians and extremes over the rounds. Results go to
results/diffeat_extract.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from processes import ROOT, machine

PATH = ROOT / "tests/bench/results/diffeat_extract.json"
PEAK = 989e12  # FLOPs a second of an H100 in bfloat16, dense
TOLERANCE = 0.05
BLOCKS = {"cifar": ("mid", "u1r2"), "adm": ("u1r1",)}
CIFAR: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}

Work = Callable[[], Any]


def network(name: str, device: str) -> Any:
    """The U-Net with random weights."""
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel

    from pomona.models.unets.adm import CONFIG

    torch.manual_seed(0)
    with torch.device(device):
        module = UNet2DModel.from_config(CIFAR if name == "cifar" else CONFIG)
    return module.eval().requires_grad_(False)


def point(module: Any, block: str) -> Any:
    """What gives the output of a block of `BLOCKS` in the whole pass."""
    return {
        "mid": module.mid_block,
        "u1r1": getattr(module.up_blocks[1], "attentions", module.up_blocks[1].resnets)[1],
        "u1r2": module.up_blocks[1],
    }[block]


def hooked(module: Any, block: str) -> Callable[[Any, Any], Any]:
    """The features by a hook at the block on the whole pass."""

    def features(x: Any, t: Any) -> Any:
        found: list[Any] = []
        handle = point(module, block).register_forward_hook(lambda _, __, output: found.append(output))
        module(x, t)
        handle.remove()
        return pooled(found[0])

    return features


def pooled(maps: Any) -> Any:
    """Averages of 2 x 2 cells, as float32 on the processor."""
    import torch

    return torch.nn.functional.adaptive_avg_pool2d(maps.float(), 2).flatten(1).cpu()


def features(name: str, wanted: str, options: argparse.Namespace) -> dict[str, Any]:
    """One block of one network: what each contender takes for one image."""
    import torch

    from pomona.models.unets.blocks import blocks, resolve
    from pomona.models.unets.truncated import Truncated

    device = options.device
    module = network(name, device)
    side = module.config.sample_size
    table = blocks(module, side)
    block = resolve([wanted], table)[0]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(options.batch, 3, side, side, generator=generator).to(device)
    t = torch.full((options.batch,), 90, device=device)
    work: dict[str, Work] = {}
    compiling: dict[str, float] = {}
    for ending, dtype in (("", torch.float32), (" bfloat16", torch.bfloat16)):
        same = copy.deepcopy(module).type(dtype)
        truncated = Truncated(same, [block.number])
        given = x.to(dtype)
        caught = hooked(same, wanted)
        work[f"hooks{ending}"] = lambda caught=caught, given=given: caught(given, t)
        work[f"truncated{ending}"] = lambda truncated=truncated, given=given: pooled(truncated(given, t)[0])
        if not options.quick:
            fast = torch.compile(truncated, fullgraph=True, dynamic=False)
            work[f"compiled{ending}"] = lambda fast=fast, given=given: pooled(fast(given, t)[0])
            begin = time.perf_counter()
            work[f"compiled{ending}"]()
            compiling[f"compiled{ending}"] = round(time.perf_counter() - begin, 1)
    differences = _agree({name: each() for name, each in work.items()})
    flops = sum(each.flops for each in table[: block.number])
    found = {
        "network": name,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "block": {"number": block.number, "name": block.name, "channels": block.channels, "side": block.side},
        "batch": options.batch,
        "gflop": {"whole": round(flops / block.share / 1e9, 3), "truncated": round(flops / 1e9, 3)},
        "flop_ratio": round(1 / block.share, 3),
        "differences": differences,
        "compile_seconds": compiling,
        **_turns(work, options.batch, options.rounds, _clock(options)),
    }
    found["gflop_a_second"] = {
        name: round((flops if "hooks" not in name else flops / block.share) / 1e6 / ms)
        for name, ms in found["ms"].items()
    }
    if device != "cpu":
        found["share_of_peak"] = {name: round(1e9 * rate / PEAK, 3) for name, rate in found["gflop_a_second"].items()}
    return found


def _clock(options: argparse.Namespace) -> Callable[[], float]:
    import torch

    if options.device == "cpu":
        return time.process_time if options.threads == 1 else time.perf_counter

    def after_all() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return after_all


def _agree(found: Mapping[str, Any]) -> dict[str, float]:
    """How far each contender's features are from the hook's in its format, and bfloat16 from float32.

    Raises:
        SystemExit: too far: then no time is worth printing.
    """

    def relative(one: Any, other: Any) -> float:
        return float((one.double() - other.double()).norm() / other.double().norm())

    told = {}
    for name, values in found.items():
        kind, _, dtype = name.partition(" ")
        told[name] = relative(values, found[f"hooks {dtype}".strip()])
        bound = {"hooks": 0.0, "truncated": 0.0, "compiled": 1e-4 if not dtype else TOLERANCE}[kind]
        if not told[name] <= bound:
            raise SystemExit(f"{name} is {told[name]:.2g} from the hook's features, more than {bound:g}")
    told["hooks bfloat16"] = relative(found["hooks bfloat16"], found["hooks"])
    if not told["hooks bfloat16"] <= TOLERANCE:
        raise SystemExit(f"bfloat16 is {told['hooks bfloat16']:.2g} from float32")
    return {name: float(f"{value:.3g}") for name, value in told.items()}


def _turns(work: Mapping[str, Work], images: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, each in work.items():
            begin = clock()
            each()
            seconds[name].append((clock() - begin) / images)
    ms = {name: round(1000 * statistics.median(each), 4) for name, each in seconds.items()}
    return {
        "ms": ms,
        "ms_range": {name: [round(1000 * f(each), 4) for f in (min, max)] for name, each in seconds.items()},
        "times_hooks": {name: round(ms["hooks"] / each, 2) for name, each in ms.items()},
    }


def targets(places: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was asked, the figure that decides it, and whether it holds."""
    told: dict[str, dict[str, Any]] = {}
    for place in places:
        name, ms = f"{place['network']} {place['block']['name']}", place["ms"]
        ratio, faster = ms["hooks"] / ms["truncated"], ms["truncated"] / ms["truncated bfloat16"]
        told[f"{name}: truncated beside hooks, within 10 % of the FLOPs'"] = {
            "figure": round(ratio, 2),
            "asked": place["flop_ratio"],
            "met": abs(ratio / place["flop_ratio"] - 1) <= 0.1,
        }
        told[f"{name}: bfloat16 beside float32"] = {"figure": round(faster, 2), "asked": 1.5, "met": faster >= 1.5}
        if name == "cifar mid":
            told[f"{name}: truncated beside hooks"] = {"figure": round(ratio, 2), "asked": 2.7, "met": ratio >= 2.7}
    return told


def show(result: Mapping[str, Any]) -> None:
    """The table, in Markdown."""
    print("| block | contender | ms an image | beside hooks | GFLOP/s | difference |\n|" + "---|" * 6)
    for place in result["places"]:
        for name, ms in place["ms"].items():
            difference = f"{place['differences'][name]:g}"
            block = f"{place['network']} {place['block']['name']}"
            cells = (block, name, ms, f"{place['times_hooks'][name]:.2f}x", place["gflop_a_second"][name])
            print(f"| {' | '.join(map(str, (*cells, difference)))} |")


def race(options: argparse.Namespace) -> dict[str, Any]:
    """All networks."""
    import torch

    torch.set_num_threads(options.threads)
    places = []
    with torch.inference_mode():
        for name in options.network.split(","):
            for block in BLOCKS[name]:
                places.append(features(name, block, options))
                print(name, block, file=sys.stderr)
    return {
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "threads": options.threads,
        "clock": "processor" if options.device == "cpu" and options.threads == 1 else "wall",
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers")},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "targets": targets(places),
        "places": places,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="features", help="what to run; other results are kept")
    parser.add_argument("--network", default="cifar", help="cifar, adm, or both by comma")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="nothing compiled; writes nothing")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "lib"))
    result: dict[str, Any] = json.loads(PATH.read_text()) if PATH.exists() else {}
    for part in options.part.split(","):
        if part != "features":
            parser.error(f"--part {part}: features")
        before = os.getloadavg()[0]
        found = race(options)
        show(found)
        for name, target in found["targets"].items():
            print(f"\n{name}: {target}")
        about = {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d")}
        name = part if options.device == "cpu" else f"{part} {options.device}"
        result[name] = about | {"machine": machine(before), **found}
        if not options.quick:
            PATH.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
