# `make` alone lists the targets. PYTHON chooses the interpreter that .venv is made of.
PYTHON ?= python3
BIN := .venv/bin

# What Ray would otherwise send home, and what tests must not depend on.
export RAY_USAGE_STATS_ENABLED := 0

# Where it is set, every process of the tests would compile this project, and pytest its tests, anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick golden soak elastic link-cut fuzz lint bench gpu-check constraints clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: ## system packages and .venv; does only what is missing
	@PYTHON=$(PYTHON) .ci/setup.sh

demo: setup ## end to end on embedded data: poison, train undefended and defended, report
	$(BIN)/dbd demo

test: setup ## every test, in two processes
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder

test-quick: setup ## the tests that take seconds
	$(BIN)/python -m pytest -n 2 -m "not slow"

golden: setup ## are results, weights, data sets and artefacts what they were, to the bit? (GOLDEN="prepare local")
	$(BIN)/python -m tests.golden.make --check $(GOLDEN)

soak: setup ## 50 whole runs on Ray, each with a random process killed; resumes where it was interrupted (SOAK="--kills 10")
	$(BIN)/python -m tests.soak --kills 50 $(SOAK)

elastic: setup ## a run on two Ray nodes that loses one, minutes
	$(BIN)/python -m tests.elastic

link-cut: setup ## runs on two Ray nodes in network namespaces whose link is cut, minutes, as root (LINK_CUT="--only fixed")
	$(BIN)/python -m tests.link_cut $(LINK_CUT)

lint: setup ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup ## measure every part on this machine: a table, and runs/bench.json
	$(BIN)/dbd bench --json runs/bench.json $(BENCH)

fuzz: setup ## ten minutes of damaged and hostile input (FUZZ="--minutes 60 --seed 1")
	$(BIN)/python -m tests.fuzz $(FUZZ)

gpu-check: ## on a host with a GPU and PyTorch: correctness, benchmarks, recipe (GPU_CHECK="--images FOLDER --budget-s 1500")
	$(PYTHON) -m dbd_dist.bench.gpu_check --out runs/gpu-check --work runs/gpu-check/work $(GPU_CHECK)

constraints: ## write constraints.txt anew from what .venv holds
	$(BIN)/python -m pip freeze --all --exclude-editable | grep -E '^[A-Za-z0-9._-]+==[^ ]+$$' | LC_ALL=C sort -f > constraints.tmp
	mv constraints.tmp constraints.txt

clean: ## remove .venv, caches and build leftovers; keeps runs and datasets
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
