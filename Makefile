# A fresh Linux machine needs Python 3.11 or newer, make and a package index. pip's own settings (PIP_INDEX_URL, PIP_CERT, ...) apply.
#
#   make quickstart              set up .venv, then the main job on its embedded example
#   make test                    the same set-up, then every test; make test ARGS="tests/test_layers.py -x" for some
#   make lint types benchmarks   what they say
#   make ... PYTHON=python3.12   with another interpreter

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
SETTINGS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart test lint types benchmarks setup

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

quickstart: $(VENV)/.made-quickstart
	$(BIN)/distill run quickstart

setup: $(VENV)/.made-dev

test: $(VENV)/.made-dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.made-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.made-dev
	$(BIN)/mypy

benchmarks: $(VENV)/.made-dev
	@set -e; for file in benchmarks/[a-z]*.py; do $(BIN)/python -m benchmarks.$$(basename $$file .py); done

$(VENV)/.made-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
	    "Install one and name it: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "No virtual environment could be made: install the venv module of $(PYTHON) (Debian and Ubuntu: apt install python3-venv)," \
	    "remove $(VENV) and run again" >&2; exit 1; }
	@touch $@

# The largest download on its own and first: if it stops, what came before is kept, and nothing else chooses another torch.
$(VENV)/.made-torch: $(VENV)/.made-python constraints.txt
	@echo "Installing torch (the first time this takes minutes) ..."
	@$(PIP) install -c constraints.txt torch==2.13.0
	@touch $@

$(VENV)/.made-quickstart: $(VENV)/.made-torch $(SETTINGS)
	@echo "Installing Distillery and what it needs ..."
	@$(PIP) install -c constraints.txt -e ".[quickstart]"
	@touch $@

$(VENV)/.made-dev: $(VENV)/.made-torch $(SETTINGS)
	@echo "Installing Distillery, what it needs and the tools for its tests ..."
	@$(PIP) install -c constraints.txt -e ".[quickstart,dev]"
	@touch $@ $(VENV)/.made-quickstart
