# `make demo` trains a small sparse language model; `make test` proves that it is right.
# Both create .venv on the first call (torch is a download of a few hundred MB) and start at once afterwards.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests run in two processes of one thread each: small matmuls gain nothing from more. Those of
# tests/parity, which start ranks of their own, stay in one of the two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup

.PHONY: demo test test-all test-gpu lint clean

demo: $(VENV)/.installed
	@if [ -e runs/demo ]; then echo "runs/demo exists: starting over (rename it to keep it)"; fi
	$(BIN)/headway train demo --run runs/demo --overwrite

test: $(VENV)/.installed
	$(PYTEST)

test-all: $(VENV)/.installed
	$(PYTEST) -m "not gpu"

test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m gpu

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# Two stamps: a change of pyproject.toml installs the package again, not torch.
$(VENV)/.torch:
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here; install Python 3.11 or later, or set PYTHON=…"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $$($(PYTHON) --version) is too old; headway needs 3.11 or later: make PYTHON=python3.12 …"; exit 1; }
	@echo "creating $(VENV) and installing PyTorch: some minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "installing headway and what its tests need"
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
