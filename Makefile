# `make demo` and `make test` need Python 3.11, make and a C compiler; everything else goes into .venv.
PYTHON ?= $(firstword $(foreach p,python3.11 python3,$(if $(shell $(p) --version 2>/dev/null),$(p))))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST_ARGS ?= -n 2 --dist worksteal
OLDEST_HF := 5.17.0
HF := $(VENV)/transformers-$(OLDEST_HF)
DEMO_OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo docs test lint clean

demo: $(READY)
	$(BIN)/nsattn train --preset tiny --out $(DEMO_OUT)

docs: $(READY)
	$(BIN)/python -m mkdocs build --strict

# The transformers tests run twice: against the newest version and the oldest that is supported.
test: lint $(HF)
	PYTHONPATH=$(HF) $(BIN)/python -m pytest $(PYTEST_ARGS) tests/test_transformers.py tests/test_transformers_cache.py
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

$(HF): $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $@ transformers==$(OLDEST_HF)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
