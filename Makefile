# `make demo` and `make test` need nothing but Python 3.10-3.12 and pip; they set up .venv in this checkout.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# glibc returns large blocks to the kernel as soon as they are freed, and a training step on a CPU then spends nearly half
# of its time having pages zeroed anew. Keeping them changes no result.
export MALLOC_TRIM_THRESHOLD_ := 8589934592
export MALLOC_MMAP_MAX_ := 0
export TOKENIZERS_PARALLELISM := false

.PHONY: setup test lint demo benchmarks clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 12) else "Python 3.10 to 3.12 is needed, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The test suite.
test: setup
	$(BIN)/python -m pytest

# Style and types.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Prune SmolLM2-135M-Instruct to 80%, measure, save, reload.
demo: setup
	$(BIN)/python -m examples.demo.prune_smollm2

# The figures in docs/results; hours on a laptop.
benchmarks: setup
	$(BIN)/python -m benchmarks.compare_methods
	$(BIN)/python -m benchmarks.ablation
	$(BIN)/python -m benchmarks.step_overhead
	$(BIN)/python -m benchmarks.reproducibility

clean:
	rm -rf $(VENV) .assets out
