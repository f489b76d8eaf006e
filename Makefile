# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo test test-all bench docs lint clean

setup: $(STAMP)

# torch first, and by exact version: a range would bring gigabytes of CUDA libraries where there is no GPU
$(STAMP): pyproject.toml native/CMakeLists.txt $(wildcard native/src/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,recovery]'
	touch $@

demo: $(STAMP)
	$(BIN)/gossamer demo $(if $(model),--model $(model)) $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" -q

test-all: $(STAMP)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q

bench: $(STAMP)
	$(BIN)/python -m benchmarks --json benchmarks/results.json $(if $(peer),--peer-python $(peer))
	$(BIN)/python -m gossamer.report.tables docs

docs: $(STAMP)
	$(BIN)/python -m gossamer.report.tables docs

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo-output
