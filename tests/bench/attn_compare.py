"""How fast our linear attention is beside others in plain torch, and beside softmax, on the same q, k and v.

    python tests/bench/attn_compare.py [--peers build/attn-peers] [--rounds 5] [--quick] [--device cpu]

Contenders take turns at each length, width of head and pass, at one thread, and are compared by processor time. All of
them map q and k by elu + 1 within the time, divide by the sum of the weights, and must agree with ours:

ours             `linear.chunked`, at its default chunk of 64
fla chunk        `naive_chunk_linear_attn` of fla-core: plain torch, lengths divisible by 64
fla recurrent    `naive_recurrent_linear_attn` of fla-core: a loop over tokens
performer        `causal_linear_attention_noncuda` of performer-pytorch: what it falls back to without compiled kernels
ours full        `linear.full`, not causal
performer full   `linear_attention` of performer-pytorch, not causal
sdpa, eager      causal softmax, which computes something else: for the ratio alone
products         the matrix products of `ours` forward and nothing besides, in the cache: what this machine allows

Everything runs in one process, that of the peers' environment, which `--peers` says where to find or to make. What is
predicted to need more than 4 GB or 4 s for a pass is left out, and said so. With `--device cuda` the contenders are our
chunks, in a loop and in a batch, fla's Triton kernels and flash SDPA in bfloat16, timed by events on the GPU, and the
length from which each linear form overtakes flash is told per width of head. Results go to results/attn_compare.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIRST = ("torch==2.13.0", "numpy", "einops==0.8.2", "setuptools")
PINNED = (  # without what they ask for: compilers, Triton
    "fla-core==0.6.0",
    "performer-pytorch==1.1.4",
    "local-attention==1.11.2",
    "hyper-connections==0.4.11",
    "axial-positional-embedding==0.3.12",
)
HEADS = 8
LENGTHS = {"cpu": (256, 1024, 4096, 16384), "cuda": (512, 1024, 2048, 4096, 8192, 16384)}
WIDTHS = {"cpu": (32, 64, 128), "cuda": (64, 128)}
PASSES = ("fwd", "fwd+bwd")
SAMPLE = 0.01  # seconds: shorter work is repeated within a sample
MOST_SECONDS, MOST_BYTES = 4.0, 4e9
CAUSAL_PEERS = ("fla chunk", "fla recurrent", "performer")
NEEDS = {  # floats held, forward and with the backward, by heads, n and d
    "fla recurrent": (lambda n, d: 6 * n * d, lambda n, d: 3 * n * d * d),
    "performer": (lambda n, d: 6 * n * d + 256 * d * d, lambda n, d: 4 * n * d * d),
    "eager": (lambda n, d: 2 * n * n, lambda n, d: 3 * n * n),
}

Attend = Callable[..., Any]
Work = Callable[[], Any]


def peers_in(folder: Path) -> Path:
    """Make the peers' environment unless it is there; its Python."""
    python = folder / "bin/python"
    if not (folder / "complete").exists():
        print(f"installing {', '.join((*FIRST, *PINNED))} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, symlinks=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *FIRST], check=True)
        subprocess.run([*pip, "--no-deps", *PINNED], check=True)
        (folder / "complete").touch()
    return python


def contenders_on_cpu() -> dict[str, tuple[Attend, bool]]:
    """Functions of q, k, v in the layout that each is made for, and whether that is (1, n, heads, d)."""
    import torch
    from performer_pytorch import performer_pytorch as performer  # type: ignore[import-not-found]
    from torch.nn import functional

    from pomona.methods.attn_compare import linear
    from pomona.methods.attn_compare.maps import Features

    naive = _fla_naive()

    def phi(x: Any) -> Any:
        return functional.elu(x) + 1

    def eager(q: Any, k: Any, v: Any) -> Any:
        n = q.shape[-2]
        later = torch.ones(n, n, dtype=torch.bool).triu_(1)
        scores = (q @ k.mT * (1 / math.sqrt(q.shape[-1]))).masked_fill_(later, -torch.inf)
        return torch.softmax(scores, -1) @ v

    def fla(function: Attend) -> Attend:
        return lambda q, k, v: _first(function(phi(q), phi(k), v, scale=1.0, normalize=True))

    return {
        "ours": (lambda q, k, v: linear.chunked(Features(phi(q)), Features(phi(k)), v), False),
        "fla chunk": (fla(naive.naive_chunk_linear_attn), True),
        "fla recurrent": (fla(naive.naive_recurrent_linear_attn), True),
        "performer": (lambda q, k, v: performer.causal_linear_attention_noncuda(phi(q), phi(k), v), False),
        "ours full": (lambda q, k, v: linear.full(Features(phi(q)), Features(phi(k)), v), False),
        "performer full": (lambda q, k, v: performer.linear_attention(phi(q), phi(k), v), False),
        "sdpa": (lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True), False),
        "eager": (eager, False),
    }


def contenders_on_cuda() -> dict[str, tuple[Attend, bool]]:
    """As on the processor, with compiled kernels for peers."""
    from fla.ops.linear_attn import chunk_linear_attn, fused_chunk_linear_attn  # type: ignore[import-not-found]
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from pomona.methods.attn_compare import kernels, linear
    from pomona.methods.attn_compare.maps import Features
    from pomona.methods.attn_compare.speed.implementations import Implementation

    batched = Implementation("batched", kernels.find("elu1"))

    def phi(x: Any) -> Any:
        return functional.elu(x) + 1

    def flash(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def fla(function: Attend) -> Attend:
        return lambda q, k, v: _first(function(phi(q), phi(k), v, scale=1.0, normalize=True))

    return {
        "ours": (lambda q, k, v: linear.chunked(Features(phi(q)), Features(phi(k)), v, chunk=256), False),
        "ours batched": (lambda q, k, v: batched.mix(Features(phi(q)), Features(phi(k)), v, 64), False),
        "fla triton chunk": (fla(chunk_linear_attn), True),
        "fla triton fused": (fla(fused_chunk_linear_attn), True),
        "sdpa": (flash, False),
    }


def _fla_naive() -> Any:
    """The module file by its path: the package around it wants Triton."""
    (file,) = [f for f in metadata.files("fla-core") or () if str(f).endswith("fla/ops/linear_attn/naive.py")]
    spec = importlib.util.spec_from_file_location("fla_naive", str(file.locate()))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _first(found: Any) -> Any:
    return found[0] if isinstance(found, tuple) else found


def race(device: str, rounds: int, *, quick: bool) -> dict[str, Any]:
    """All contenders at all places; runs in the peers' environment."""
    import torch

    torch.set_num_threads(1)
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is visible to torch in the peers' environment")
    contenders = contenders_on_cuda() if device == "cuda" else contenders_on_cpu()
    lengths = LENGTHS[device][:2] if quick else LENGTHS[device]
    places = []
    for way in PASSES:
        for width in WIDTHS[device]:
            known: dict[str, tuple[int, float]] = {}
            for length in lengths:
                place = _place(contenders, known, way, length, width, device, rounds)
                places.append(place)
                print(f"{way} n={length} d={width}: {_told(place)}", file=sys.stderr)
    versions = {name: metadata.version(name) for name in ("torch", *(pin.split("==")[0] for pin in PINNED))}
    return {"versions": versions, "places": places}


def _place(
    contenders: Mapping[str, tuple[Attend, bool]],
    known: dict[str, tuple[int, float]],
    way: str,
    length: int,
    width: int,
    device: str,
    rounds: int,
) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(length * width)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    heads_first = [torch.randn((1, HEADS, length, width), generator=generator).to(device, dtype) for _ in range(3)]
    tokens_first = [x.transpose(1, 2).contiguous() for x in heads_first]
    work: dict[str, Work] = {}
    skipped = {}
    for name, (attend, by_token) in contenders.items():
        if reason := _too_much(name, known, way, length, width):
            skipped[name] = reason
            continue
        work[name] = _work(attend, tokens_first if by_token else heads_first, way)
    if device == "cpu" and way == "fwd":
        work["products"] = _products(length, width)
    differences = {}
    for names, reference in ((work, "ours"), ([n for n in work if n.endswith("full")], "ours full")):
        expected = _heads_first(work[reference](), contenders[reference][1])
        for name in names:
            if name in (reference, "sdpa", "eager", "products", "ours full") or (name == "performer full") != (
                "full" in reference
            ):
                continue
            found = _heads_first(work[name](), contenders[name][1])
            differences[name] = [
                float((x.double() - y.double()).abs().max() / max(1.0, float(y.double().abs().max())))
                for x, y in zip(found, expected, strict=True)
            ]
        if device == "cuda":
            break  # where nothing is measured without a mask
    seconds, turns = _turns(work, rounds, device)
    for name, each in turns.items():
        known[name] = (length, min(each))
    return {
        "pass": way,
        "length": length,
        "width": width,
        "ms": {name: round(1000 * statistics.median(each), 4) for name, each in turns.items()},
        "ms_min": {name: round(1000 * min(each), 4) for name, each in turns.items()},
        "wall_ms": {name: round(1000 * statistics.median(each), 4) for name, each in seconds.items()},
        "times_ours": {
            name: round(min(each) / min(turns["ours full" if name == "performer full" else "ours"]), 3)
            for name, each in turns.items()
        },
        "difference": {name: float(f"{max(each):.2e}") for name, each in differences.items()},
        "skipped": skipped,
    }


def _too_much(name: str, known: Mapping[str, tuple[int, float]], way: str, length: int, width: int) -> str | None:
    if name in NEEDS:
        need = 4 * HEADS * NEEDS[name][PASSES.index(way)](length, width)
        if need > MOST_BYTES:
            return f"predicted to need {need / 1e9:.1f} GB"
    if name not in known:  # at the shortest length; otherwise it was left out before
        return None if length <= 512 else "was left out at a shorter length"
    before, seconds = known[name]
    power = 2 if name in ("sdpa", "eager") else 1
    predicted = seconds * (length / before) ** power
    return f"predicted to take {predicted:.0f} s" if predicted > MOST_SECONDS else None


def _work(attend: Attend, given: list[Any], way: str) -> Work:
    import torch

    if way == "fwd":

        def forward() -> list[Any]:
            with torch.no_grad():
                return [attend(*given)]

        return forward
    leaves = [x.detach().clone().requires_grad_() for x in given]

    def both() -> list[Any]:
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, given[2])]

    return both


def _products(length: int, width: int) -> Work:
    import torch

    q, v = torch.rand(HEADS, 64, width), torch.rand(HEADS, 64, width + 1)
    scores, out, state = (torch.empty(HEADS, *size) for size in ((64, 64), (64, width + 1), (width, width + 1)))

    def run() -> None:
        for _ in range(length // 64):
            torch.bmm(q, q.mT, out=scores)
            torch.bmm(scores, v, out=out)
            torch.bmm(q.mT, v, out=state)
            torch.bmm(q, state, out=out)

    return run


def _heads_first(found: list[Any], by_token: bool) -> list[Any]:
    return [x.transpose(1, 2) for x in found] if by_token else found


def _turns(work: Mapping[str, Work], rounds: int, device: str) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall seconds and seconds that count (processor, or device) of each contender's turns."""
    clock = _on_device if device == "cuda" else _on_processor
    first = {name: clock(each, 1)[1] for name, each in work.items()}
    if max(first.values()) < 1:
        first = {name: clock(each, 1)[1] for name, each in work.items()}
    times = {name: max(1, math.ceil(SAMPLE / max(seconds, 1e-7))) for name, seconds in first.items()}
    turns = {name: rounds if seconds < 0.5 else min(rounds, 3 if seconds < 2 else 2) for name, seconds in first.items()}
    wall: dict[str, list[float]] = {name: [] for name in work}
    counts: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds):
        for name, each in work.items():
            if turn < turns[name]:
                if first[name] < 0.5:  # not the first to touch what the one before has left of cache and memory
                    each()
                passed, counted = clock(each, times[name])
                wall[name].append(passed / times[name])
                counts[name].append(counted / times[name])
    return wall, counts


def _on_processor(work: Work, times: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        work()
    return time.perf_counter() - wall, time.process_time() - cpu


def _on_device(work: Work, times: int) -> tuple[float, float]:
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    wall = time.perf_counter()
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return time.perf_counter() - wall, begin.elapsed_time(end) / 1000


def targets(places: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was asked of us on the processor, the figure that decides it, and whether it holds."""
    from_1024 = [
        (ratio, peer, place)
        for place in places
        for peer, ratio in place["times_ours"].items()
        if place["length"] >= 1024 and peer in (*CAUSAL_PEERS, "performer full")
    ]
    at_4096 = [place for place in places if place["length"] == 4096]
    chunk = [place["times_ours"]["fla chunk"] for place in at_4096]
    performer, allowed = {}, {}
    for place in at_4096:
        ratios = place["times_ours"]
        if "performer" in ratios:
            performer[f"{place['pass']} d={place['width']}"] = ratios["performer"]
            if "products" in ratios:
                allowed[f"{place['pass']} d={place['width']}"] = round(ratios["performer"] / ratios["products"], 2)
    difference = max(value for place in places for value in place["difference"].values())
    least, peer, where = min(from_1024, key=lambda found: found[0])
    return {
        "equal to every peer, to 1e-5 of the largest number": {"largest": difference, "met": difference <= 1e-5},
        "within 1.1 of the fastest plain-torch peer from 1024": {
            "peer_over_ours": least,
            "at": f"{peer}, {where['pass']} n={where['length']} d={where['width']}",
            "met": least >= 1 / 1.1,
        },
        "1.5 times as fast as fla's naive chunk at 4096": {"least": min(chunk, default=None), "met": _all(chunk, 1.5)},
        "20 times as fast as performer's fallback at 4096": {
            "ratios": performer,
            "if_products_alone_took_time": allowed,
            "met": _all(list(performer.values()), 20),
        },
    }


def _all(ratios: list[float], least: float) -> bool | None:
    return min(ratios) >= least if ratios else None


def crossovers(places: list[dict[str, Any]]) -> dict[str, dict[str, float | str]]:
    """Where each linear form overtakes softmax, per pass and width of head."""
    sys.path.insert(0, str(ROOT / "lib"))
    from pomona.methods.attn_compare.speed.crossover import crossing

    found: dict[str, dict[str, float | str]] = {}
    for way, width in dict.fromkeys((place["pass"], place["width"]) for place in places):
        here = [place for place in places if (place["pass"], place["width"]) == (way, width)]
        for name in dict.fromkeys(
            name for place in here for name in place["ms"] if name not in ("sdpa", "eager", "products")
        ):
            both = [place for place in here if name in place["ms"] and "sdpa" in place["ms"]]
            if "full" in name or not both:
                continue
            at = crossing(
                [place["length"] for place in both],
                [place["ms"]["sdpa"] for place in both],
                [place["ms"][name] for place in both],
            )
            first, last = both[0]["length"], both[-1]["length"]
            told = round(at) if math.isfinite(at) else f"below {first}" if at < 0 else f"beyond {last}"
            found.setdefault(f"{way} d={width}", {})[name] = told
    return found


def _told(place: Mapping[str, Any]) -> str:
    return ", ".join([*(f"{n} {ms:.2f} ms" for n, ms in place["ms"].items()), *(f"{n} -" for n in place["skipped"])])


def show(result: Mapping[str, Any]) -> None:
    """The tables, in Markdown."""
    for device in ("cpu", "cuda"):
        part = result.get(device)
        if not isinstance(part, dict):
            print(f"\n{device}: {part}")
            continue
        names = list(dict.fromkeys(name for place in part["places"] for name in place["ms"]))
        print(f"\n{device}: ms, and times ours in brackets, least of the rounds\n")
        print(f"| pass | n | d | {' | '.join(names)} |\n|{'---|' * (len(names) + 3)}")
        for place in part["places"]:
            cells = list(_cells(place, names))
            print(f"| {place['pass']} | {place['length']} | {place['width']} | {' | '.join(cells)} |")
        for name, target in part.get("targets", {}).items():
            print(f"\n{name}: {target}", end="")
        print(f"\n\novertakes SDPA from: {part['crossover']}")


def _cells(place: Mapping[str, Any], names: list[str]) -> Iterator[str]:
    for name in names:
        if name in place["ms_min"]:
            yield f"{place['ms_min'][name]:.2f} ({place['times_ours'][name]:.2f})"
        else:
            yield place["skipped"].get(name, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path("build/attn-peers"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="two lengths and two rounds; nothing is kept")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "attn_compare.json")
    parser.add_argument("--race", action="store_true", help=argparse.SUPPRESS)  # within the peers' environment
    args = parser.parse_args()
    if args.race:
        print(json.dumps(race(args.device, args.rounds, quick=args.quick)))
        return
    python = peers_in(args.peers.absolute())
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT / "lib"), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [
        str(python),
        __file__,
        "--race",
        "--device",
        args.device,
        "--rounds",
        str(2 if args.quick else args.rounds),
    ]
    before = os.getloadavg()[0]
    said = subprocess.run(
        [*command, *(["--quick"] if args.quick else [])],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=surroundings,
    )
    part = json.loads(said.stdout.splitlines()[-1])
    part["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(before, 2), round(os.getloadavg()[0], 2)],
        "python": platform.python_version(),
    }
    if args.device == "cpu" and not args.quick:
        part["targets"] = targets(part["places"])
    part["crossover"] = crossovers(part["places"])
    result = json.loads(args.output.read_text()) if args.output.exists() else {}
    result = {
        "cpu": result.get("cpu", "not run"),
        "cuda": result.get("cuda", "not run: no CUDA device on this machine"),
    }
    result[args.device] = {
        "command": f"python tests/bench/attn_compare.py --device {args.device} --rounds {args.rounds}",
        "date": time.strftime("%Y-%m-%d"),
        "threads": 1,
        "heads": HEADS,
        **part,
    }
    show(result)
    if not args.quick:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
