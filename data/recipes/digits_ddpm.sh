#!/usr/bin/env bash
# Train the model that `--model digits` reads, on the train half of scikit-learn's digits: two minutes on one core.
# Usage: bash data/recipes/digits_ddpm.sh [FOLDER]      build/digits by default
set -euo pipefail
cd "$(dirname "$0")/../.."
pomona diffeat-extract builtin:digits --train-model 2000 --seed 0 -o "${1:-build/digits}"
