"""What `nlpbench-eval`, lm-eval and inspect make of a server that fails: 20 questions, and a fault one time in five.

    python tests/bench/nlpbench_faults.py [--peers build/peers]

A passing fault is every fifth reply, and asking again may help; a lasting one is every reply to every fifth question.
All other replies are the right answer, so whatever a tool scores as wrong it was never told. The server knows which
questions it answered in the end; the tools' own files say how each was scored. Every tool retries as it does by
default, and is killed after two minutes (exit code -9). Results go to results/nlpbench_faults.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from nlpbench_peers import EVERY, FAULTS, TOOLS, Cost, Exam, Examiner, Marks, machine, peers_in, synthetic

QUESTIONS = 20
LIMIT = 120.0  # seconds until a tool is killed


def probe(exam: Exam, tool: str, peers: Path, server: Examiner, output: Path) -> dict[str, Any]:
    """What `tool` exits with and says about itself, and how that compares with what the server knows."""
    cost = Cost.of(exam.start(tool, peers, server.url, output), time.perf_counter(), LIMIT)
    seating, marks = server.end(), Marks.read(tool, peers, output)
    unanswered = {record["id"] for record in exam.records} - seating.answered
    return {
        "exit_code": cost.code,
        "accuracy": None if marks.accuracy is None else round(marks.accuracy, 4),
        "scored": marks.scored,
        "says": marks.said,
        "requests": seating.calls,
        "unanswered": len(unanswered),
        "unanswered_scored_wrong": sum(marks.by_id.get(name) is False for name in unanswered),
        "answered_scored_wrong": sum(marks.by_id.get(name) is False for name in seating.answered),
        "answered_lost": sum(marks.by_id.get(name) is None for name in seating.answered),
        "wall_s": round(cost.wall, 1),
    }


def show(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """The tables, in Markdown."""
    heads = ["fault", "tool", "exit", "reports", "over", "says", "never answered", "of these scored wrong"]
    heads += ["answered, lost", "seconds"]
    for kind, by_fault in found.items():
        which = f"every {EVERY}th reply" if kind == "passing" else f"every reply to every {EVERY}th question"
        print(f"\n{QUESTIONS} questions, {which} faulty\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        for fault, by in by_fault.items():
            for tool, f in by.items():
                shown = [f["exit_code"], f["accuracy"], f["scored"], f["says"], f["unanswered"]]
                shown += [f["unanswered_scored_wrong"], f["answered_lost"], f["wall_s"]]
                print(
                    f"| {fault} | {tool} | " + " | ".join("–" if cell is None else str(cell) for cell in shown) + " |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path("build/peers"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "nlpbench_faults.json")
    args = parser.parse_args()
    peers = args.peers.absolute()
    versions = {"pomona": metadata.version("pomona"), **peers_in(peers)}
    records = [record for record in synthetic() if record["group"] is None][:QUESTIONS]
    found: dict[str, dict[str, dict[str, Any]]] = {"passing": {}, "lasting": {}}
    with tempfile.TemporaryDirectory() as name, Examiner(records) as server:
        exam = Exam.write(Path(name) / "exam", records)
        for kind, by_fault in found.items():
            for number, fault in enumerate(FAULTS):
                by_fault[fault] = {}
                for tool in TOOLS:
                    server.begin(fault=fault, lasting=kind == "lasting")
                    output = Path(name) / f"{kind}-{number}-{tool}"
                    by_fault[fault][tool] = probe(exam, tool, peers, server, output)
                print(f"{kind}, {fault}: done", file=sys.stderr)
    show(found)
    result = {
        "command": "python tests/bench/nlpbench_faults.py " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions,
        "questions": QUESTIONS,
        "every": EVERY,
        "faults": found,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
