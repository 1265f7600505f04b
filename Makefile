# `make demo` and `make test` need Python 3.11, make and a C compiler; everything else goes into .venv.
PYTHON ?= $(firstword $(foreach p,python3.11 python3,$(if $(shell $(p) --version 2>/dev/null),$(p))))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST_ARGS ?= -n 2
DEMO_OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/nsattn train --preset tiny --out $(DEMO_OUT)

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/pyright

# The constraints hold for what is installed and, through the environment, for the build backend.
$(READY): pyproject.toml constraints.txt
	@echo 'Setting up $(VENV): a few minutes the first time.'
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
