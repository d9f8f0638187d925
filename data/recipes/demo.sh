#!/usr/bin/env bash
# Score, rate, filter and report the shipped records with the embedded model; no network, no account.
# Usage: bash data/recipes/demo.sh [FOLDER]      what it makes goes to FOLDER, build/demo by default
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/demo}
mkdir -p "$out"

pomona ifd-score data/instructions.jsonl --variant cherry |
  pomona alpagasus-filter --judge local --prompt rubric-first --top 50% \
    --report "$out/report.md" -o "$out/kept.jsonl" --overwrite

echo "Kept records: $out/kept.jsonl   Report with plots: $out/report.md" >&2
