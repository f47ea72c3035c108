# make run    install, measure this machine, plan, serve, load, compare; keeps serving
# make test   install and run every test
# make check  format, lint, types, import directions
# make bench  the long benchmarks, one after the other; each prints its table
# Nothing is needed before but Python 3.11 or newer. VENV= names another environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
.DEFAULT_GOAL := help

.PHONY: help install run test check bench
help:
	@sed -n 's/^# //p' Makefile

# torch stands in the same command as the packages that need it, pinned by the
# constraints, so that pip resolves it once.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Tongyun needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 -e '.[dev]'
	touch $@

install: $(STAMP)

run: $(STAMP)
	$(BIN)/tongyun up

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit/test_imports.py

bench: $(STAMP)
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done
