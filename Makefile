# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.
#
#   PYTHON=python3.12             another interpreter (3.11 or later)
#   PIP_FLAGS="--index-url ..."   more flags for pip, for instance PyTorch's CPU index, which spares a CPU-only
#                                 Linux machine gigabytes of CUDA libraries

PYTHON ?= python3
PIP_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# --no-compile: Python compiles what it imports, 5,000 files of 23,000
PIP := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help install demo reproduce test docs lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with the package (editable) and the tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "puma-hf needs Python 3.11 or later; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV) (the first time takes some minutes: torch is large)"
	@# torch first and alone: pinned, so that a CPU wheel is taken where one is offered
	@$(PIP) torch
	@$(PIP) --editable ".[dev]"
	@touch $@

demo: $(STAMP) ## run the demo, offline and on the CPU
	@HF_HUB_OFFLINE=1 $(BIN)/python demo/run.py

reproduce: $(STAMP) ## PUMA as released, on the demo's data; ARGS="--mbeir DIR --nli FILE" for M-BEIR with Qwen2-VL-7B
	@HF_HUB_OFFLINE=$(if $(ARGS),0,1) $(BIN)/python benchmarks/reproduce.py $(or $(ARGS),--tiny)

test: $(STAMP) ## run the tests, offline; those of the examples are in `make docs`
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist worksteal --ignore tests/docs

docs: $(STAMP) ## build the site into site/, and run every example of it, of README.md and of the docstrings
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@BUILT_SITE=$(CURDIR)/site HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist worksteal tests/docs

lint: $(STAMP) ## check style, format and types
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

format: $(STAMP) ## mend style and format where ruff can
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

clean: ## remove caches and builds; .venv stays
	@rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
