# Every target sets up .venv by itself, once: `make quickstart` and `make test` work in a fresh clone.
#
#   PYTHON=python3.12 make test        choose the interpreter (3.11 or 3.12)
#   PIP_ARGS=...                       more arguments for pip, for example an index with CPU-only torch

SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3 python,$(if $(shell command -v $(name) 2>/dev/null),$(name))))
PIP_ARGS ?=
PYTEST_ARGS ?=
# Faults of each kind in `make faults`.
FAULT_ROUNDS ?= 20
SOAK_S ?= 3600
STAMP := $(VENV)/.installed
# What `make bench` runs; bench.pipeline needs the real SGLang server of `make sglang-env`.
BENCHES = bench.wire.throughput bench.engine.embedded bench.envs bench.kernels bench.staleness.mix \
  $(if $(wildcard $(SGLANG_VENV)/bin/python),bench.pipeline.client_overhead bench.pipeline.weight_updates)
# SGLang's own environment: its pins and ours do not go together.
SGLANG_VENV ?= .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.installed
SGLANG_CPU := tests/sglang_cpu

# Two OpenMP threads per process on busy cores are many times slower than one.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint types format sglang-env sglang faults faults-short fuzz soak bench clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## make .venv with pinned versions

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "no python found: install Python 3.11 or 3.12, or set PYTHON=/path/to/python" >&2; exit 2; fi
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), but this project needs Python 3.11 or 3.12: set PYTHON=python3.11" >&2; exit 2; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || { \
	  echo "cannot make $(VENV): on Debian and Ubuntu install the package python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

quickstart: $(STAMP) ## train a tiny model through the whole pipeline on a CPU and draw the curve
	$(BIN)/cod train configs/quickstart.toml \
	  --name "$$([ -e runs/quickstart ] && date +quickstart-%Y%m%d-%H%M%S || echo quickstart)"

test: $(STAMP) ## run the whole test suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP) ## check style, names, docstrings and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell $$(git ls-files 2>/dev/null || echo cod_async kernels tests configs)

types: $(STAMP) ## check types
	$(BIN)/mypy cod_async kernels/cod_kernels

format: $(STAMP) ## rewrite files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(SGLANG_STAMP): $(SGLANG_CPU)/requirements.txt $(SGLANG_CPU)/stand_ins/cod_stand_ins.py
	@if [ -z "$(PYTHON)" ]; then echo "no python found: install Python 3.11 or 3.12, or set PYTHON=/path/to/python" >&2; exit 2; fi
	@[ -x $(SGLANG_VENV)/bin/python ] || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -r $(SGLANG_CPU)/requirements.txt
	$(SGLANG_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps xgrammar==0.2.7 sglang==0.5.23
	printf '%s\nimport cod_stand_ins\n' "$(abspath $(SGLANG_CPU)/stand_ins)" > \
	  "$$($(SGLANG_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/cod_stand_ins.pth"
	@touch $(SGLANG_STAMP)

sglang-env: $(SGLANG_STAMP) ## make .venv-sglang: the real SGLang server, on a CPU

sglang: $(STAMP) $(SGLANG_STAMP) ## train a tiny model through real SGLang servers on a CPU
	$(BIN)/cod train configs/ci/sglang_cpu.toml --name "sglang-$$(date +%Y%m%d-%H%M%S)"

faults: $(STAMP) ## kill -9 everything, FAULT_ROUNDS times each, and check that nothing is lost or trained twice
	$(BIN)/python -m tests.faults.drill --role all --kills $(FAULT_ROUNDS) --report docs/reports/faults.json

faults-short: $(STAMP) ## the same, five times each, and without a report
	$(BIN)/python -m tests.faults.drill --role all --kills 5

fuzz: $(STAMP) ## a million hostile responses to every environment and parser
	$(BIN)/python -m tests.fuzz.responses --count 1000000 --json docs/reports/response_fuzz.json

soak: $(STAMP) ## kill random processes of run after run for SOAK_S seconds
	$(BIN)/python -m tests.faults.drill --role mixed --soak $(SOAK_S)

bench: $(STAMP) ## measure speed side by side and print ratios
	@for module in $(BENCHES); do echo "== $$module"; $(BIN)/python -m $$module || exit 1; done

clean: ## remove the environments and caches, keep runs
	rm -rf $(VENV) $(SGLANG_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
