# Every target sets itself up: a virtual environment in .venv, made anew when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo test check proto bench clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: $(READY)
	$(BIN)/python -m cluster demo

test: check
	$(BIN)/pytest -q

# What needs no running: style, types, layers, and that the committed stubs are what proto/ generates.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=tests/support $(BIN)/lint-imports
	$(BIN)/python deploy/proto.py --check

proto: $(READY)
	$(BIN)/python deploy/proto.py

bench: $(READY)
	$(BIN)/python -m cluster bench baseline

clean:
	rm -rf $(VENV) build dist *.egg-info
