# Two commands for a newcomer: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Compiling takes most of the time and one core each. A file's tests share compiled programs, so they stay together.
WORKERS := -n auto --maxprocesses 8 --dist loadfile

.PHONY: demo test test-all lint types format clean

demo: $(VENV)/.train ## train a TARFlow on the built-in digits, then draw samples
	$(BIN)/python train.py --config configs/tarflow_digits.py --workdir runs/digits
	$(BIN)/python sample.py --checkpoint runs/digits --num 100 --out runs/digits/samples.png

test: $(VENV)/.dev ## the default test suite
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not gpu"

test-all: $(VENV)/.dev ## the slow tests as well
	$(BIN)/python -m pytest $(WORKERS) -m "not gpu"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/ty check --python $(VENV)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flowgen needs Python 3.11 or newer; run make with PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[train]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@ $(VENV)/.train
