# Every target sets itself up: a virtual environment in .venv, made anew when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo test soak check proto bench clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: $(READY)
	$(BIN)/herd demo

test: check
	$(BIN)/pytest -q -m "not soak"

# What takes longer than ten minutes. DRILL_TIMES=20 in the environment repeats every drill so often.
soak: check
	$(BIN)/pytest -q --hypothesis-profile=new

# What needs no running: style, types, layers, and that the committed stubs are what proto/ generates.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=tests/support $(BIN)/lint-imports
	$(BIN)/python deploy/proto.py --check

proto: $(READY)
	$(BIN)/python deploy/proto.py

# MODEL is a checkpoint folder; without one, a tiny Scout shows that the bench runs.
bench: $(READY)
	test -n "$(MODEL)" || test -d build/tiny-scout || $(BIN)/herd make-tiny scout build/tiny-scout
	$(BIN)/herd bench dispatch
	$(BIN)/herd bench engine $(or $(MODEL),build/tiny-scout) --transport local --output 32
	$(BIN)/herd bench loop $(or $(MODEL),build/tiny-scout)
	$(BIN)/herd bench engine $(or $(MODEL),build/tiny-scout) --transport grpc --hosts 2

clean:
	rm -rf $(VENV) build dist *.egg-info
