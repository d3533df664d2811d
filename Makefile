# Two commands: `make compare` sets everything up and runs the main job, `make test` sets everything up and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes where there is no GPU (tests/conftest.py); a file's tests stay together, files go in their order.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
ARGS ?=

.PHONY: compare test test-full lint clean
.DELETE_ON_ERROR:

compare: $(VENV)/.run
	$(BIN)/headgrid compare $(ARGS)

test: $(VENV)/.dev lint
	$(PYTEST) $(ARGS)

test-full: $(VENV)/.dev lint
	$(PYTEST) --full $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check headgrid tests
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "headgrid needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
