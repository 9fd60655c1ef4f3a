# Two commands for a newcomer: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Compiling takes most of the time and one core each. A file's tests share compiled programs, so they stay together.
WORKERS := -n auto --maxprocesses 8 --dist loadfile

# Another instruction set, without fused multiply-add, and one thread: sums in another order than on this processor.
OTHERWISE := --xla_cpu_multi_thread_eigen=false $(if $(filter x86_64 amd64,$(shell uname -m)),--xla_cpu_max_isa=AVX)

.PHONY: demo test test-slow test-numeric test-all soak models docs lint types format clean

# sample.py draws the last picture in runs/digits/samples/ once more, to show how it is done.
demo: $(VENV)/.train ## train a TARFlow on the built-in digits, then draw samples
	$(BIN)/python train.py --config configs/tarflow_digits.py --workdir runs/digits
	$(BIN)/python sample.py --checkpoint runs/digits --num 100 --out runs/digits/samples.png

test: $(VENV)/.dev ## the default test suite, about eight minutes on two idle cores
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not gpu"

# A fixed list, never cut by the clock: every test marked slow, law tables first. It may take 35 minutes on two cores (its
# law tables take four minutes of one core). Trials that would make it longer are shortened there and whole in `make soak`.
test-slow: $(VENV)/.dev ## the slow tests
	$(BIN)/python -m pytest $(WORKERS) --no-loadscope-reorder -m "slow and not gpu"

test-numeric: $(VENV)/.dev ## comparisons of float32 results as another processor would make them
	XLA_FLAGS="$(OTHERWISE)" $(BIN)/python -m pytest $(WORKERS) -m "numeric and not slow and not gpu"

test-all: $(VENV)/.dev ## the default suite and the slow tests in one
	$(BIN)/python -m pytest $(WORKERS) -m "not gpu"

soak: $(VENV)/.dev ## long trials: runs killed a hundred times, five hundred malformed files
	$(BIN)/python tests/soak/kills.py --kills 100
	$(BIN)/python tests/soak/malformed.py --inputs 500

models: $(VENV)/.train ## train the models that ship with flowgen again, about five minutes on two idle cores
	$(BIN)/python train.py --config configs/tarflow_digits.py --workdir runs/digits
	$(BIN)/python train.py --config configs/cfm_digits.py --workdir runs/digits-cfm
	rm -rf flowgen/models/digits flowgen/models/digits-cfm
	$(BIN)/python -m flowgen export runs/digits --dtype float16 --license apache-2.0 --out flowgen/models/digits
	$(BIN)/python -m flowgen export runs/digits-cfm --dtype float16 --license apache-2.0 --out flowgen/models/digits-cfm

docs: $(VENV)/.dev ## the site in site/; a warning, such as a dead link, is an error
	$(BIN)/zensical build --clean --strict

lint: docs
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
