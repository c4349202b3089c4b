# The two commands of the README are `make demo` and `make test`. Each sets up what it needs by itself, needs the
# network only for that, and is quick the second time: the set-up is redone when pyproject.toml, constraints.txt,
# the Python or the folder changes, and only then.
#
#   make demo PYTHON=python3.12        another Python (3.11 or newer)
#   make demo TORCH="torch FLAGS"      another build of PyTorch: whatever pip is told to install for it
#   make test JOBS=4 ARGS="-k papers"  more processes; arguments for pytest
#
# `make newest` does in an environment of its own what depends most on other libraries, with the newest releases that
# pyproject.toml allows instead of those in constraints.txt. Only PyTorch stays as it is pinned: see below.

PYTHON ?= python3
TORCH  ?= torch
JOBS   ?= 2
ARGS   ?=
OUT    ?= demo
VENV   := .venv
PY     := $(VENV)/bin/python
# Modules are compiled when they are first imported: pip would compile all that there are, one after another.
PIP    := $(PY) -m pip --quiet --disable-pip-version-check install --no-compile --constraint constraints.txt

# Everything that would make an existing environment the wrong one. Its checksum is part of the stamp's name.
KEY    := $(shell { cat pyproject.toml constraints.txt; $(PYTHON) --version; echo '$(TORCH)'; pwd; } 2>&1 | cksum | tr ' ' -)
READY  := $(VENV)/.ready-$(KEY)

# The same for the newest releases: they are looked for once a day. PyTorch is what TORCH says, else the pinned one.
NEWEST := .venv-newest
NEWEST_PY := $(NEWEST)/bin/python
NEWEST_PIP := $(NEWEST_PY) -m pip --quiet --disable-pip-version-check install --no-compile
NEWEST_TORCH := $(if $(filter file,$(origin TORCH)),$(shell grep '^torch==' constraints.txt),$(TORCH))
NEWEST_READY := $(NEWEST)/.ready-$(KEY)-$(shell date +%F)
NEWEST_RUNS := build/newest
# What it runs besides the demo and a QLoRA run: the tests of everything that other libraries' releases have broken or
# may break - loading, quantised bases, PEFT's files, the trainers, the command line's own check.
NEWEST_TESTS := tests/adapters/peft tests/model/loading tests/model/test_quantize.py tests/train/trainer/test_mixin.py \
  tests/train/trainer/test_checkpoint.py tests/train/runner/test_quantized_base.py tests/train/runner/test_run.py \
  tests/cli/test_doctor.py tests/test_private_names.py tests/serve/test_parity.py tests/serve/engine/test_continuous.py

# Without compiled modules on disk every new Python would compile PyTorch and the libraries around it again.
unexport PYTHONDONTWRITEBYTECODE

# One thread per process (the tests run in $(JOBS) of them), and no look at the network from any library.
QUIET  := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1

.PHONY: help demo test laws lint types newest docs bench clean

help:
	@echo "make demo    fine-tune a language model with LoRA here, offline; writes $(OUT)/report.html"
	@echo "make test    every test, including the README, the docs and the examples"
	@echo "make laws    the laws for all combinations of methods, layers and precisions; make test takes a selection"
	@echo "make lint    ruff: rules and format        make types   mypy --strict"
	@echo "make newest  the demo, QLoRA and the tests of what other libraries do, with their newest releases"
	@echo "make docs    the pages, to build/docs      make bench   the measurements of the README"
	@echo "make clean   remove what these made, the environment in $(VENV) included"

demo: $(READY)
	@$(OFFLINE) $(VENV)/bin/lorary demo --out $(OUT) $(ARGS)

test: $(READY)
	@$(QUIET) $(OFFLINE) $(PY) -m pytest -n $(JOBS) --dist loadgroup --verbosity=0 $(ARGS)

laws: $(READY)
	@$(QUIET) $(OFFLINE) $(PY) -m pytest -n $(JOBS) --verbosity=0 --laws=all tests/laws/test_laws.py $(ARGS)

lint: $(READY)
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

types: $(READY)
	@$(PY) -m mypy

newest: $(NEWEST_READY)
	@echo "With the newest releases:"; $(NEWEST_PY) -m pip --disable-pip-version-check freeze --exclude-editable | \
	  grep -Ei '^(torch|transformers|trl|accelerate|peft|datasets|bitsandbytes|tokenizers|huggingface_hub|safetensors|pydantic|typer|numpy|triton)=='
	@rm -rf $(NEWEST_RUNS) && mkdir -p $(NEWEST_RUNS)
	@$(QUIET) $(OFFLINE) $(NEWEST)/bin/lorary demo --out $(NEWEST_RUNS)/demo
	@$(NEWEST)/bin/lorary init $(NEWEST_RUNS)/qlora.yaml && $(QUIET) $(OFFLINE) $(NEWEST)/bin/lorary train \
	  $(NEWEST_RUNS)/qlora.yaml --set method.name=qlora --set training.max_steps=20 --set output=$(NEWEST_RUNS)/qlora
	@$(QUIET) $(OFFLINE) $(NEWEST_PY) -m pytest -n $(JOBS) --dist loadgroup --verbosity=0 $(NEWEST_TESTS) $(ARGS)

docs: $(READY)
	@$(PY) docs/generate.py && $(PY) scripts/import_graph.py
	@$(PY) -m sphinx --quiet --fail-on-warning --keep-going -b html docs build/docs && echo "build/docs/index.html"

bench: $(READY)
	@$(OFFLINE) $(PY) benchmarks/step.py $(ARGS)

clean:
	rm -rf $(VENV) $(NEWEST) build dist demo .pytest_cache .mypy_cache .ruff_cache
	find src tests scripts benchmarks examples docs -name __pycache__ -type d -prune -exec rm -rf {} +

# A new pip first: that of a Python takes twice as long. Then PyTorch by itself, pinned: an unpinned one may bring
# gigabytes of another accelerator's libraries.
$(READY): environment = $(VENV)
$(READY): install = $(PIP) pip && $(PIP) $(TORCH) && $(PIP) --editable '.[dev]'
$(NEWEST_READY): environment = $(NEWEST)
$(NEWEST_READY): install = $(NEWEST_PIP) --upgrade pip && $(NEWEST_PIP) $(NEWEST_TORCH) && \
  $(NEWEST_PIP) --upgrade --upgrade-strategy eager $(NEWEST_TORCH) --editable '.[dev]'
$(READY) $(NEWEST_READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: lorary needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)"; \
	  echo "hint: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@start=$$(date +%s); echo "Setting up $(environment): once, with the network ..."; rm -f $(environment)/.ready-*; \
	$(PYTHON) -m venv $(environment) || { echo "hint: Debian and Ubuntu keep it in the package python3-venv"; exit 1; }; \
	$(install) && touch $@ && echo "Set up in $$(( $$(date +%s) - start )) s."
