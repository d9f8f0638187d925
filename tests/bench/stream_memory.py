"""Peak memory of `alpagasus-filter --ratings` on a file far larger than it should need.

    python tests/bench/stream_memory.py [--gigabytes 2]

Writes records and one rating each, joins them by content and by position, and reads the peak resident memory of each
run from the kernel. Results go to results/stream_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

TEXT = "Pears are picked before they are ripe and finish ripening off the tree, in a cool and dark place. " * 8


def write(folder: Path, size: int) -> int:
    """Records of about 1.2 kB until there are `size` bytes, and a rating for each; returns how many."""
    count = written = 0
    with (folder / "data.jsonl").open("w") as data, (folder / "ratings.jsonl").open("w") as ratings:
        while written < size:
            said = {"instruction": f"Question {count}: when are pears ripe?", "input": "", "output": f"{count}. {TEXT}"}
            written += data.write(json.dumps({**said, "id": count, "notes": TEXT[:350]}) + "\n")
            ratings.write(json.dumps({**said, "output": said["output"], "score": 4 + count % 3 / 2}) + "\n")
            count += 1
    return count


def run(folder: Path, *options: str) -> dict[str, object]:
    """Run the command to its end; seconds, peak memory in MB and its summary."""
    command = [sys.executable, "-m", "pomona_cli", "alpagasus-filter", str(folder / "data.jsonl"), *options]
    command += ["-o", str(folder / "kept.jsonl"), "--overwrite", "-q"]
    out, into = os.pipe()
    started = time.perf_counter()
    child = os.posix_spawn(sys.executable, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, into, 1)])
    os.close(into)
    summary = json.loads(os.fdopen(out).read())
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"the command ended with status {status}")
    return {
        "options": " ".join(o for o in options if not o.startswith(str(folder))),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_mb": round(usage.ru_maxrss / 1000),
        "in": summary["in"],
        "out": summary["out"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = write(folder, int(args.gigabytes * 1e9))
        ratings = str(folder / "ratings.jsonl")
        size = (folder / "data.jsonl").stat().st_size
        print(f"{count:,} records, {size / 1e9:.2f} GB")
        runs = [
            run(folder, "--ratings", ratings),
            run(folder, "--ratings", ratings, "--join", "index", "--top", "1%"),
        ]
    for entry in runs:
        print(entry)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "bytes": size,
        "runs": runs,
    }
    path = Path(__file__).parent / "results" / "stream_memory.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
