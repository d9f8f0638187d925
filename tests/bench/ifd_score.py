"""How fast `ifd-score` is beside the arithmetic of the reference code, on the same records in the same run.

    python tests/bench/ifd_score.py [--records 200] [--rounds 2] [--device cpu]

Contenders take turns over chunks of records, so that a busy machine hits them alike:

a  the reference's arithmetic: one record at a time, hidden states kept, two forwards, then a log-softmax and a scalar
   read per token; at whichever of one or all threads serves it best
b  the same two forwards without the per-token part
ours, in float32 and, where the hardware computes in it, bfloat16

The data is Alpaca's random subset (``POMONA_SHARED``/data/alpaca/random_9k.json). Results go to results/ifd_score.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from pomona.io.conversation import Fields, turns
from pomona.io.journal import NoJournal
from pomona.methods.ifd_score import scoring
from pomona.methods.ifd_score.config import Config, Recipe, resolve
from pomona.methods.ifd_score.run import _Text
from pomona.models.loading import Scorer, load_causal_lm
from pomona.models.losses import batches, heads, passage_nll
from pomona.runtime.device import Runtime

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("POMONA_SHARED", ROOT.parent / "shared"))
LENGTH = 512
SCAFFOLD = "### Response:"


def texts(record: dict[str, str]) -> tuple[str, str, str]:
    """Prompt, conditioned text and direct text of the reference's Alpaca template."""
    if record["input"]:
        prompt = (
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            f"a response that appropriately completes the request.\n\n### Instruction:\n{record['instruction']}\n\n"
            f"### Input:\n{record['input']}\n\n{SCAFFOLD}"
        )
    else:
        prompt = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{record['instruction']}\n\n{SCAFFOLD}"
        )
    return prompt, prompt + record["output"], SCAFFOLD + record["output"]


def loop(scorer: Scorer, records: list[dict[str, str]], threads: int, *, per_token: bool) -> list[float | None]:
    """IFD of each record, one at a time; `per_token` adds what the reference does with every logit row."""
    torch.set_num_threads(threads)
    model, tokenizer = scorer.model, scorer.tokenizer
    found: list[float | None] = []
    for record in records:
        prompt, conditioned, direct = texts(record)
        length = len(tokenizer.encode(prompt, truncation=True, max_length=LENGTH))
        means = []
        for text, start, limit in (
            (direct, len(tokenizer.encode(SCAFFOLD)), LENGTH - length + 4),
            (conditioned, length, LENGTH),
        ):
            ids = tokenizer.encode(text, return_tensors="pt", truncation=True, max_length=limit).to(model.device)
            labels = ids.clone()
            labels[0, :start] = -100
            with torch.no_grad():
                output = model(ids, labels=labels, output_hidden_states=per_token)
            if per_token:
                losses = []
                for i in range(1, ids.shape[1]):
                    row = torch.log_softmax(output.logits[0, i - 1], dim=-1)
                    losses.append(torch.nn.functional.nll_loss(row[None], ids[0, i][None]).item())
                part = losses[start - 1 :]
                means.append(sum(part) / len(part) if part else float("nan"))
            else:
                means.append(output.loss.item())
        found.append(means[1] / means[0] if record["output"] else None)
    torch.set_num_threads(1)
    return found


def budget_of(runtime: Runtime) -> int:
    return scoring.token_budget(runtime.device.type, runtime.dtype.itemsize)


def ours(scorer: Scorer, text: _Text, recipe: Recipe, records: list[dict[str, str]]) -> list[float | None]:
    """IFD of each record as the command computes it, tokenising included."""
    window = text.window([(record, turns(record, Fields())) for record in records])
    budget = budget_of(scorer.runtime)

    def measure(passages: Any) -> list[tuple[float, ...]]:
        return passage_nll(scorer, passages, tokens_per_batch=budget, chunk_rows=2048)

    sums = scoring.nll_sums(
        window, measure, tokens_per_batch=budget, journal=NoJournal(), identity={}, completed=lambda n: None
    )
    return [entry["ifd"] for entry in scoring.scores(window, sums, recipe)]


def tokens(text: _Text, records: list[dict[str, str]], budget: int) -> dict[str, int]:
    """Tokens as they are, as computed once heads are shared, as padded, and rows of logits."""
    passages = text.window([(record, turns(record, Fields())) for record in records]).passages
    shared = heads(passages)
    lengths = [len(p.ids) - n for p, n in zip(passages, shared, strict=True)]
    padded = 0
    for n in set(shared):
        own = [length for length, head in zip(lengths, shared, strict=True) if head == n]
        padded += sum(len(batch) * own[batch[0]] for batch in batches(own, budget))
    return {
        "real": sum(len(p.ids) for p in passages),
        "computed": sum(lengths),
        "padded": padded,
        "rows": sum(end - start for p in passages for start, end in p.spans),
    }


def plain_product(model: Any, dtype: torch.dtype, device: torch.device, threads: int, rows: int) -> float:
    """GFLOP/s of bare matrix products with the model's own shapes, run as our forwards run: side by side."""
    shapes = [
        tuple(p.shape) for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    ]
    weights = {
        shape: torch.randn(shape, dtype=dtype, device=device) for shape in {*shapes, tuple(model.lm_head.weight.shape)}
    }
    inputs = {k: torch.randn(rows, k, dtype=dtype, device=device) for k in {shape[1] for shape in weights}}
    per_pass = [*shapes, tuple(model.lm_head.weight.shape)]

    def one_pass(_: int) -> None:
        for shape in per_pass:
            torch.nn.functional.linear(inputs[shape[1]], weights[shape])

    passes = threads * 8
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(one_pass, range(threads)))
        started = time.perf_counter()
        list(pool.map(one_pass, range(passes)))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return passes * sum(2 * rows * a * b for a, b in per_pass) / seconds / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default=None)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ifd_score.json")
    args = parser.parse_args()
    data = SHARED / "data/alpaca/random_9k.json"
    if not data.is_file():
        sys.exit(f"{data} is not here; set POMONA_SHARED to the folder of reference data")
    everything = [r for r in json.loads(data.read_text()) if r["output"]]
    records = random.Random(0).sample(everything, args.records)

    recipe = resolve(Config(variant="cherry", bos="none"))
    runtimes = {"float32": Runtime.open(args.device, "float32", 0)}
    if Runtime.open(args.device, "auto", 0).dtype is torch.bfloat16:
        runtimes["bfloat16"] = Runtime.open(args.device, "bfloat16", 0)
    scorers = {name: load_causal_lm(args.model, runtime) for name, runtime in runtimes.items()}
    text = _Text.of(scorers["float32"].tokenizer, recipe)
    threads = runtimes["float32"].threads

    warm = everything[:6]
    speed = {}
    for count in sorted({1, threads}):
        for per_token in (True, False):
            loop(scorers["float32"], warm[:2], count, per_token=per_token)
            started = time.perf_counter()
            loop(scorers["float32"], warm, count, per_token=per_token)
            speed[per_token, count] = time.perf_counter() - started
    best = {per_token: min((s, n) for (p, n), s in speed.items() if p is per_token)[1] for per_token in (True, False)}

    contenders: dict[str, Callable[[list[dict[str, str]]], list[float | None]]] = {
        "a": lambda part: loop(scorers["float32"], part, best[True], per_token=True),
        "b": lambda part: loop(scorers["float32"], part, best[False], per_token=False),
        **{name: lambda part, s=scorer: ours(s, text, recipe, part) for name, scorer in scorers.items()},
    }
    wall, cpu = dict.fromkeys(contenders, 0.0), dict.fromkeys(contenders, 0.0)
    scores: dict[str, list[Any]] = {name: [] for name in contenders}
    per_round: list[dict[str, float]] = []
    size = -(-len(records) // args.rounds)
    for name in scorers:
        contenders[name](warm)
    for number in range(args.rounds):
        part = records[number * size : (number + 1) * size]
        this = {}
        order = list(contenders) if number % 2 == 0 else list(reversed(contenders))
        for name in order:
            before, before_cpu = time.perf_counter(), time.process_time()
            scores[name] += contenders[name](part)
            this[name] = time.perf_counter() - before
            wall[name] += this[name]
            cpu[name] += time.process_time() - before_cpu
        per_round.append({name: round(seconds, 3) for name, seconds in this.items()})
        print(f"round {number + 1}: " + ", ".join(f"{n} {s:.1f} s" for n, s in this.items()), file=sys.stderr)

    counts = {name: tokens(text, records, budget_of(runtime)) for name, runtime in runtimes.items()}
    count = counts["float32"]
    model = scorers["float32"].model
    head = model.get_output_embeddings().weight.numel()
    body = sum(
        p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    )
    flop = 2 * (body * count["computed"] + head * count["rows"])
    reference = np.array(scores["a"], dtype=float)
    usable = np.isfinite(reference)
    result: dict[str, Any] = {
        "command": "python tests/bench/ifd_score.py " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "device": str(runtimes["float32"].device),
            "processor": platform.processor() or platform.machine(),
            "threads": threads,
            "bfloat16": "bfloat16" in scorers,
        },
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "records": len(records),
        "tokens": counts,
        "seconds_per_round": per_round,
        "loops_threads": {"a": best[True], "b": best[False]},
        "contenders": {},
    }
    print(
        f"\n{len(records)} records, {count['real']:,} tokens; "
        f"loops at {best[True]} and {best[False]} threads, ours {threads}"
    )
    print("             records/s  wall s   cpu s   vs a   vs b   max|dIFD|  Spearman  top-10%   GFLOP/s  of product")
    for name in contenders:
        entry: dict[str, Any] = {
            "wall_s": round(wall[name], 2),
            "cpu_s": round(cpu[name], 2),
            "records_per_s": round(len(records) / wall[name], 3),
            "ratio_a": round(wall["a"] / wall[name], 3),
            "ratio_b": round(wall["b"] / wall[name], 3),
        }
        other = np.array(scores[name], dtype=float)
        top = [
            set(np.argsort(-np.where(usable, s, -np.inf), kind="stable")[: len(records) // 10])
            for s in (reference, other)
        ]
        entry |= {
            "max_difference": float(np.abs(other - reference)[usable].max()),
            "spearman": float(spearmanr(reference[usable], other[usable]).statistic),
            "top_tenth_overlap": len(top[0] & top[1]) / len(top[0]),
        }
        if name in scorers:
            runtime = runtimes[name]
            product = plain_product(model, runtime.dtype, runtime.device, runtime.threads, min(budget_of(runtime), 256))
            entry |= {
                "real_tokens_per_s": round(count["real"] / wall[name]),
                "padded_tokens_per_s": round(counts[name]["padded"] / wall[name]),
                "gflops": round(flop / wall[name] / 1e9, 1),
                "product_gflops": round(product, 1),
            }
        result["contenders"][name] = entry
        tail = f"{entry['gflops']:9.1f}  {entry['gflops'] / entry['product_gflops']:.0%}" if "gflops" in entry else ""
        print(
            f"{name:>10}  {entry['records_per_s']:10.2f} {wall[name]:7.1f} {cpu[name]:7.1f} {entry['ratio_a']:6.2f} "
            f"{entry['ratio_b']:6.2f}   {entry['max_difference']:9.2e}  {entry['spearman']:.5f}   "
            f"{entry['top_tenth_overlap']:6.0%} {tail}"
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
