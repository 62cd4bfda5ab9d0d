# `make demo` and `make test` need nothing but Python 3.10+ and make: the first call installs into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: help demo test lint format clean

help:
	@echo "make demo     train a small network dense, and compressed in one fit; compare the two (about two minutes)"
	@echo "make test     run all tests"
	@echo "make lint     check style and types"
	@echo "make format   mend what the linter can mend"
	@echo "make clean    remove .venv and everything that runs left behind"

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist outputs multirun runs lightning_logs .mypy_cache .pytest_cache .ruff_cache

# One install for each state of these files. A stamp says that it was finished; a broken one is done again.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[examples,export,plots,test]'
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
