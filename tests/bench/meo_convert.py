"""How fast merged experts are beside transformers' own mixture block, and a streaming conversion beside mergekit.

    python tests/bench/meo_convert.py [--part blocks,conversion] [--peers build/mergekit] [--rounds 5] [--threads 1]
                                      [--quick]

`conversion` is told in meo_streaming.py. mergekit has an environment of its own, whose Python POMONA_MERGEKIT_PYTHON
names; without it, `--peers` says where to find or to make one. Of `blocks`:

One Mixtral block at a time in float32, 8 experts of which k are selected, all contenders on the same weights and
tokens, taking turns in one process:

meo         `MergedExperts`: merge, then one pass; while decoding the merged experts stay with the cache
eager       transformers' `MixtralSparseMoeBlock`, experts in a loop
grouped     the same with `grouped_mm`, its default
dense       one expert alone, without router or merge: what nothing with experts can beat

A prefill is one pass over S tokens, the merge included. A decoding step is one token with what the prefill left. The
break-even is the number of tokens after which the merge has paid for itself. Seconds are of the processor with one
thread, since the machine may not be ours alone, and of the wall clock with more; medians and extremes over the rounds.
FLOPs of the matrix products stand beside them. Results go to results/meo_convert.json.
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
from pathlib import Path
from typing import Any

import meo_streaming as streaming
from processes import ROOT, machine

SHAPES = ((512, 1024), (1024, 3584))  # width, inner width
SELECTED = (1, 2, 4, 8)
LENGTHS = (1, 16, 128, 512)
EXPERTS = 8
CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}

Work = Callable[[], Any]
Clock = Callable[[], float]


def blocks(width: int, inner: int, k: int) -> dict[str, Any]:
    """The contenders on the same random weights."""
    import torch
    from torch import nn
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    from pomona.methods.meo_convert import modeling_meo as meo

    made: dict[str, Any] = {}
    for name, experts in (("eager", "eager"), ("grouped", "grouped_mm"), ("meo", "eager")):
        config = MixtralConfig(
            hidden_size=width, intermediate_size=inner, num_local_experts=EXPERTS, num_experts_per_tok=k
        )
        config._experts_implementation = experts
        made[name] = MixtralSparseMoeBlock(config).eval()
    torch.manual_seed(0)
    for parameter in made["eager"].parameters():
        nn.init.normal_(parameter, std=0.02)
    for name in ("grouped", "meo"):  # the very tensors: neither contender has caches warmer than another's
        made[name].gate.weight = made["eager"].gate.weight
        made[name].experts.gate_up_proj = made["eager"].experts.gate_up_proj
        made[name].experts.down_proj = made["eager"].experts.down_proj
    settings = meo.Settings(experts=EXPERTS, selected=k, scope="prompt")
    merged = meo.MergedExperts(made["meo"], width, settings).eval()
    merged.scene, merged.name = meo.Scene(settings, causal=True, whole=True), "block"
    made["meo"] = merged
    into, out = made["eager"].experts.gate_up_proj[0], made["eager"].experts.down_proj[0]

    def dense(x: Any) -> Any:
        gate, up = nn.functional.linear(x, into).chunk(2, -1)
        return nn.functional.linear(nn.functional.silu(gate) * up, out)

    made["dense"] = dense
    return made


def prefill(width: int, inner: int, k: int, length: int, rounds: int, clock: Clock) -> dict[str, Any]:
    """One pass over `length` tokens."""
    import torch

    made = blocks(width, inner, k)
    x = torch.randn(1, length, width, generator=torch.Generator().manual_seed(length))
    _agree(made, x)
    place = {"pass": "prefill", "width": width, "inner": inner, "k": k, "tokens": length}
    each = 3 * 2 * width * inner
    place["gflop"] = {"meo": (length + k) * each / 1e9, "moe": length * k * each / 1e9, "dense": length * each / 1e9}
    return place | _turns({name: (lambda block=block: block(x)) for name, block in made.items()}, rounds, clock)


def decode(width: int, inner: int, k: int, rounds: int, clock: Clock) -> dict[str, Any]:
    """One token after a prompt of 16; `meo` has what it merged then."""
    import torch

    from pomona.methods.meo_convert import modeling_meo as meo

    made = blocks(width, inner, k)
    merged = made["meo"]
    prompt = torch.randn(1, 16, width, generator=torch.Generator().manual_seed(1))
    token = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(2))
    merged.scene.now = meo.Pass(memory=meo.Memory(length=16))

    def merge() -> Any:
        merged.scene.now = meo.Pass(memory=meo.Memory(length=16))
        return merged(prompt[:, :1])

    place = {"pass": "decode", "width": width, "inner": inner, "k": k, "tokens": 1}
    merging = _turns({"merge": merge}, rounds, clock)
    merge()
    place |= _turns({name: (lambda block=block: block(token)) for name, block in made.items()}, rounds, clock)
    place["merge_ms"] = merging["ms"]["merge"]
    saved = min(place["ms"]["eager"], place["ms"]["grouped"]) - place["ms"]["meo"]
    place["break_even_tokens"] = round(place["merge_ms"] / saved, 1) if saved > 0 else None
    return place


def _agree(made: Mapping[str, Any], x: Any) -> None:
    """Both mixtures agree, and with a router that is sure of one expert all three do: nothing cheaper is timed."""
    import torch

    torch.testing.assert_close(made["grouped"](x), made["eager"](x), atol=1e-4, rtol=1e-4)
    router = made["eager"].gate.weight
    kept = router.clone()
    router.zero_()
    router[3] = 1e4 * x[0].mean(0) / x[0].mean(0).norm()
    token = x[:, :1]
    router[3] = 1e4 * token[0, 0]
    torch.testing.assert_close(made["meo"](token), made["eager"](token), atol=1e-4, rtol=1e-4)
    router.copy_(kept)


def _turns(work: Mapping[str, Work], rounds: int, clock: Clock) -> dict[str, Any]:
    times = {}
    for name, each in work.items():
        each()
        begin = clock()
        each()
        times[name] = max(1, int(0.02 / max(1e-6, clock() - begin)))
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, each in work.items():
            begin = clock()
            for _ in range(times[name]):
                each()
            seconds[name].append((clock() - begin) / times[name])
    found: dict[str, Any] = {
        "ms": {name: round(1000 * statistics.median(each), 4) for name, each in seconds.items()},
        "ms_range": {name: [round(1000 * f(each), 4) for f in (min, max)] for name, each in seconds.items()},
    }
    if "meo" in work:
        found["times_meo"] = {name: round(ms / found["ms"]["meo"], 2) for name, ms in found["ms"].items()}
    return found


def targets(places: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was asked, the figure that decides it, and whether it holds."""
    p1 = [p for p in places if p["pass"] == "prefill" and (p["width"], p["k"], p["tokens"]) == (512, 8, 512)]
    p2 = [p for p in places if p["pass"] == "decode" and p["k"] == 8]
    slower = {
        f"{p['pass']} {p['width']}/{p['inner']} k={p['k']} S={p['tokens']}": round(1 / p["times_meo"]["dense"], 1)
        for p in places
        if p["times_meo"]["dense"] < 0.5
    }
    told: dict[str, dict[str, Any]] = {}
    for name, chosen, least in (("P1: prefill, k=8, S=512, 512/1024", p1, 3.0), ("P2: decode, k=8", p2, 4.0)):
        ratios = [min(p["times_meo"]["eager"], p["times_meo"]["grouped"]) for p in chosen]
        told[name] = {"times the better peer": ratios, "asked": least, "met": min(ratios) >= least if ratios else None}
    told["over twice the time of one dense expert"] = slower
    return told


def show(result: Mapping[str, Any]) -> None:
    """The table, in Markdown."""
    print("| pass | shape | k | S | meo ms | eager | grouped | dense | FLOPs | break-even |\n|" + "---|" * 10)
    for p in result["places"]:
        ratios = " | ".join(f"{p['times_meo'][name]:.2f}x" for name in ("eager", "grouped", "dense"))
        flops = f"{p['gflop']['moe'] / p['gflop']['meo']:.2f}x" if "gflop" in p else ""
        shape = f"{p['width']}/{p['inner']}"
        cells = (p["pass"], shape, p["k"], p["tokens"], p["ms"]["meo"], ratios, flops, p.get("break_even_tokens", ""))
        print(f"| {' | '.join(map(str, cells))} |")


def race(rounds: int, threads: int, *, quick: bool) -> dict[str, Any]:
    """All blocks at all places."""
    import torch

    torch.set_num_threads(threads)
    clock = "processor" if threads == 1 else "wall"
    places = []
    with torch.no_grad():
        for width, inner in SHAPES[:1] if quick else SHAPES:
            for k in (2, 8) if quick else SELECTED:
                for length in (16, 512) if quick else LENGTHS:
                    places.append(prefill(width, inner, k, length, rounds, CLOCKS[clock]))
                places.append(decode(width, inner, k, rounds, CLOCKS[clock]))
                print(f"{width}/{inner} k={k}", file=sys.stderr)
    return {
        "threads": threads,
        "clock": clock,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "targets": targets(places),
        "places": places,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="blocks,conversion", help="what to run; other results are kept")
    parser.add_argument("--peers", type=Path, default=Path("build/mergekit"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the blocks")
    parser.add_argument("--quick", action="store_true", help="few blocks, a miniature conversion; writes nothing")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "lib"))
    path = ROOT / "tests/bench/results/meo_convert.json"
    result: dict[str, Any] = dict.fromkeys(("blocks", "conversion"), "not run")
    result |= json.loads(path.read_text()) if path.exists() else {}
    for part in options.part.split(","):
        before = os.getloadavg()[0]
        if part == "conversion":
            found = streaming.conversions(options.peers, options.rounds, quick=options.quick)
            found = {"targets": streaming.targets(found), **found}
            streaming.show(found)
        elif part == "blocks":
            found = race(options.rounds, options.threads, quick=options.quick)
            show(found)
        else:
            parser.error(f"--part {part}: blocks, conversion")
        for name, target in found["targets"].items():
            print(f"\n{name}: {target}")
        about = {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d")}
        result[part] = about | {"machine": machine(before), **found}
        if not options.quick:
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
