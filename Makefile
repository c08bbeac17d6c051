# Each target makes .venv by itself the first time; later runs only check that it is up to date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=

.PHONY: quickstart test lint docs venv clean

quickstart: $(STAMP)
	$(BIN)/nemo-bluelm quickstart

# Two files at a time, each on one core: most tests are too small for more threads.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(STAMP)
	$(BIN)/python tools/make_key_reference.py
	$(BIN)/python -m mkdocs build --strict

venv: $(STAMP)

# torch goes first and alone: resolved together with the rest, pip may fetch a CUDA build where a CPU build is offered.
$(STAMP): setup.cfg pyproject.toml constraints/cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints/cpu.txt torch
	$(BIN)/python -m pip install --quiet -c constraints/cpu.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
