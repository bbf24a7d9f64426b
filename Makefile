# make demo and make test need Python (3.11 or newer) and make, nothing else; they create .venv on their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := outputs/demo
# glibc gives freed activations back to the system after each step and pays for the page faults again, and OpenMP's
# threads wait without giving up their core, which a busy machine needs. Neither changes a result; other systems ignore it.
ENVIRONMENT := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 GOMP_SPINCOUNT=1000
# Processes that run tests.
WORKERS ?= 2
CORES := $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')

.DEFAULT_GOAL := help
.PHONY: help demo baseline test test-slow test-gpu reliability mutations compat common-tests audit quality style bench bench-gpu clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,demo,tools,page,vad,serve,onnx,dev]'
	@touch $@

demo: $(STAMP) ## corpus -> training -> evaluation -> save -> load back -> a conversation, scored and drawn
	$(BIN)/mamba-ema prepare synthetic --output data/demo
	$(ENVIRONMENT) $(BIN)/accelerate launch --config_file configuration/accelerate/cpu.yaml --num_cpu_threads_per_process $(CORES) \
		examples/run_finetune.py configuration/demo.yaml
	$(BIN)/mamba-ema predict --model $(DEMO)/model data/demo --conversation-id test_013 --plots $(DEMO) --overwrite

baseline: $(STAMP) ## what eGeMAPS and an SVR reach on the demo's corpus, beside its model; openSMILE is for research only
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[baseline]'
	$(BIN)/python examples/classical_baseline.py data/demo --predictions $(DEMO)/predictions_test.csv

# A file's tests stay together, as they share fixtures; the files run in their order, in which no long one comes last.
test: $(STAMP) ## the test suite, without tests marked slow or gpu
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-slow: $(STAMP) ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-gpu: $(STAMP) ## the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu -v

reliability: $(STAMP) ## every promise of docs/reliability.md, with the figures seen
	$(BIN)/python -m tests.tools.report

mutations: $(STAMP) ## break the code in six places; named tests must fail
	$(BIN)/python -m tests.tools.mutations

compat: $(STAMP) ## transformers 4.57 to the newest, by remote code and installed, model and training
	$(BIN)/python -m tests.tools.compat

common-tests: $(STAMP) ## the tests that transformers runs on its own models; downloads its source release
	$(BIN)/python -m tests.tools.common_tests

audit: $(STAMP) ## known weaknesses of the pinned versions; needs the network
	$(BIN)/python -m tests.tools.audit

quality: $(STAMP) ## lint and types, as CI sees them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(STAMP) ## mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## side-by-side measurements
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -W ignore benchmarks/run.py

bench-gpu: $(STAMP) ## the encoder and the updater on a CUDA GPU
	$(BIN)/python -W ignore benchmarks/bench_gpu.py --json outputs/benchmarks/gpu.json

clean: ## remove outputs; keeps .venv
	rm -rf outputs data build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
