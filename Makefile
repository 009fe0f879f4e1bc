# The commands of the README. Each one makes what it needs; nothing is installed by hand.
PYTHON ?= python3
VENV ?= .venv
PARITY_VENV ?= .venv-parity
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS := $(wildcard ci/constraints-$(VERSION).txt)
PIP_CONSTRAINTS := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: install demo test test-parity check protos serve bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_CONSTRAINTS) -e '.[dev]'
	touch $@

demo: install
	$(BIN)/sona demo

serve: install
	$(BIN)/sona serve

test: install
	$(BIN)/python -m pytest -q -ra --durations=10

# torch has many builds; the CPU build of this version is a quarter of the default's size.
$(PARITY_VENV)/.installed: pyproject.toml ci/parity.txt $(CONSTRAINTS)
	$(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/python -m pip install -q $(PIP_CONSTRAINTS) -r ci/parity.txt -e '.[dev]'
	touch $@

test-parity: $(PARITY_VENV)/.installed
	$(PARITY_VENV)/bin/python -m pytest -q -ra -o addopts="--import-mode=importlib --strict-markers" tests/parity

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/python tools/gen_protos.py --check

protos: install
	$(BIN)/python tools/gen_protos.py

bench: install
	$(BIN)/sona bench learn --quick --seeds 5

clean:
	rm -rf build dist .pytest_cache .ruff_cache
