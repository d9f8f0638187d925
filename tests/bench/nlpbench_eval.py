"""How fast `nlpbench-eval` is beside lm-eval and inspect, on the same messages from the same server.

    python tests/bench/nlpbench_eval.py [--peers build/peers] [--rounds 5] [--quick]

The tools take turns, round after round, with a server that answers at once, after 50 ms and after 200 ms, each time
from the start of the process to its end; and so they do with one question, which is what starting costs. A round counts
only if all three sent the same message arrays, byte for byte, never had more in flight than they were told, and scored
everything right. A further run of ours asks 20,000 questions while its memory is watched. `--peers` is where the peers'
environment is, or is made. Results go to results/nlpbench_eval.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

from nlpbench_peers import CONCURRENCY, TOOLS, Cost, Exam, Examiner, Marks, Seating, machine, peers_in, synthetic

LATENCIES = (0.0, 0.05, 0.2)
MANY = 20_000
PAGE = os.sysconf("SC_PAGESIZE")


def sit(exam: Exam, tool: str, peers: Path, server: Examiner, latency: float, output: Path) -> tuple[Cost, Seating]:
    """One run of `tool`, its cost and what the server saw; everything ends here unless the run was faultless."""
    server.begin(latency)
    started = time.perf_counter()
    cost = Cost.of(exam.start(tool, peers, server.url, output), started)
    seating, marks = server.end(), Marks.read(tool, peers, output)
    size = len(exam.records)
    if cost.code or marks.accuracy != 1.0 or marks.scored != size or seating.calls != size:
        tail = Path(f"{output}.err").read_text()[-2000:]
        sys.exit(f"{tool}: exit code {cost.code}, {marks}, {seating.calls} calls of {size}\n{tail}")
    if seating.peak > CONCURRENCY:
        sys.exit(f"{tool} had {seating.peak} requests in flight, was told {CONCURRENCY} at most")
    shutil.rmtree(output)
    return cost, seating


def race(exams: dict[str, Exam], peers: Path, rounds: int, folder: Path) -> dict[str, Any]:
    """All tools at all latencies, interleaved; seconds and megabytes of each run by name, and what was sent."""
    found: dict[str, dict[str, list[Cost]]] = defaultdict(lambda: defaultdict(list))
    peak: dict[str, int] = {}
    sent: dict[str, tuple[str, ...]] = {}
    places = [("start-up", 0.0), *((f"{latency * 1000:.0f} ms", latency) for latency in LATENCIES)]
    with Examiner(exams["all"].records) as server:
        for tool in TOOLS:  # bytecode, caches
            sit(exams["one"], tool, peers, server, 0.0, folder / "warm")
            sit(exams["all"], tool, peers, server, 0.0, folder / "warm")
        for number in range(rounds):
            for place, latency in places:
                exam = exams["one" if place == "start-up" else "all"]
                for tool in TOOLS:
                    cost, seating = sit(exam, tool, peers, server, latency, folder / "run")
                    if sent.setdefault(exam.folder.name, seating.messages) != seating.messages:
                        sys.exit(f"{tool} sent other messages than {TOOLS[0]}")
                    found[place][tool].append(cost)
                    peak[tool] = max(peak.get(tool, 0), seating.peak)
                spent = ", ".join(f"{tool} {found[place][tool][-1].wall:.2f} s" for tool in TOOLS)
                print(f"round {number + 1}, {place}: {spent}", file=sys.stderr)
    return {
        "arrays_sent": {name: len(messages) for name, messages in sent.items()},
        "in_flight": peak,
        "places": {place: {tool: _figures(costs) for tool, costs in by.items()} for place, by in found.items()},
    }


def _figures(costs: list[Cost]) -> dict[str, Any]:
    wall = [round(cost.wall, 3) for cost in costs]
    return {
        "wall_s": round(statistics.median(wall), 3),
        "wall_s_min": min(wall),
        "cpu_s": round(statistics.median(cost.cpu for cost in costs), 3),
        "peak_mb": round(max(cost.peak_mb for cost in costs), 1),
        "wall_s_all": wall,
    }


def derive(result: dict[str, Any], size: int) -> None:
    """Add slopes, ratios to the peers and the distance from the ideal number of waves."""
    places = result["places"]
    for place, latency in ((f"{latency * 1000:.0f} ms", latency) for latency in LATENCIES):
        for figures, start in ((places[place][tool], places["start-up"][tool]) for tool in TOOLS):
            figures["ms_per_question"] = round(1000 * (figures["wall_s"] - start["wall_s"]) / (size - 1), 2)
            figures["cpu_ms_per_question"] = round(1000 * (figures["cpu_s"] - start["cpu_s"]) / (size - 1), 2)
            figures["times_ours"] = round(figures["wall_s"] / places[place]["ours"]["wall_s"], 2)
            if latency:
                ideal = math.ceil(size / CONCURRENCY) * latency
                figures["of_ideal"] = round(figures["wall_s"] / ideal, 2)


def endure(exam: Exam, peers: Path, folder: Path) -> dict[str, Any]:
    """Our command over many questions: resident memory by requests received, and requests a second."""
    size, output, seen = len(exam.records), folder / "long", []
    with Examiner(exam.records) as server:
        server.begin()
        started = time.perf_counter()
        child = exam.start("ours", peers, server.url, output)
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            resident = int(Path(f"/proc/{child.pid}/statm").read_text().split()[1]) * PAGE / 2**20
            seen.append((server.calls, time.perf_counter() - started, resident))
            time.sleep(0.01)
        cost = Cost.of(child, started)
        seating, marks = server.end(), Marks.read("ours", peers, output)
    if cost.code or marks.accuracy != 1.0 or seating.calls != size or len(set(seating.messages)) != size:
        sys.exit(f"exit code {cost.code}, {marks.accuracy}, {seating.calls} calls\n{Path(f'{output}.err').read_text()}")
    at = {
        calls: next(sample for sample in seen if sample[0] >= calls)
        for calls in range(size // 10, size + 1, size // 10)
    }
    first, last = at[size // 10], at[size]
    return {
        "questions": size,
        "wall_s": round(cost.wall, 2),
        "cpu_s": round(cost.cpu, 2),
        "calls_per_s": round((last[0] - first[0]) / (last[1] - first[1]), 1),
        "after_last_call_s": round(cost.wall - last[1], 2),
        "cpu_ms_per_call": round(1000 * cost.cpu / size, 3),
        "resident_mb_at_calls": {calls: round(sample[2], 1) for calls, sample in at.items()},
        "growth_mb": round(last[2] - first[2], 1),
        "peak_mb": round(cost.peak_mb, 1),
    }


def many(size: int) -> list[dict[str, Any]]:
    """The synthetic questions over and over, each copy with ids and wording of its own."""
    records = synthetic()
    copies = range(-(-size // len(records)))
    return [
        {**r, "id": f"{n}-{r['id']}", "group": r["group"] and f"{n}-{r['group']}", "question": f"{n}. {r['question']}"}
        for n in copies
        for r in records
    ][:size]


def show(result: dict[str, Any]) -> None:
    """The tables, in Markdown."""
    print(f"\n{result['questions']} questions, {result['rounds']} rounds, {CONCURRENCY} in flight; medians\n")
    heads = [
        "reply after",
        "tool",
        "wall s (least)",
        "CPU s",
        "peak MB",
        "ms/question (CPU)",
        "wall of ours",
        "of ideal",
    ]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for place, by in result["places"].items():
        for tool, f in by.items():
            each = f"{f['ms_per_question']:.2f} ({f['cpu_ms_per_question']:.2f})" if "ms_per_question" in f else ""
            times = f"{f['times_ours']:.2f}×" if "times_ours" in f else ""
            ideal = f"{f['of_ideal']:.2f}×" if "of_ideal" in f else ""
            wall = f"{f['wall_s']:.2f} ({f['wall_s_min']:.2f})"
            print(f"| {place} | {tool} | {wall} | {f['cpu_s']:.2f} | {f['peak_mb']:.0f} | {each} | {times} | {ideal} |")
    if long := result.get("long"):
        print(f"\n{long['questions']:,} questions by ours: {long['calls_per_s']:.0f} calls/s, ", end="")
        print(f"{long['cpu_ms_per_call']:.2f} ms CPU per call, {long['growth_mb']:+.1f} MB ", end="")
        print(f"from a tenth of the calls to the last, {long['peak_mb']:.0f} MB at most, {long['wall_s']:.1f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path("build/peers"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="one round, and 2,000 questions for 20,000; nothing is kept"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "nlpbench_eval.json")
    args = parser.parse_args()
    peers = args.peers.absolute()
    versions = {"pomona": metadata.version("pomona"), **peers_in(peers)}
    records = synthetic()
    result: dict[str, Any] = {
        "command": "python tests/bench/nlpbench_eval.py " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions,
        "questions": len(records),
        "rounds": 1 if args.quick else args.rounds,
        "concurrency": CONCURRENCY,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exams = {"all": Exam.write(folder / "all", records), "one": Exam.write(folder / "one", records[-1:])}
        result |= race(exams, peers, result["rounds"], folder)
        derive(result, len(records))
        long = Exam.write(folder / "long-exam", many(MANY // 10 if args.quick else MANY))
        result["long"] = endure(long, peers, folder)
    show(result)
    if not args.quick:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
