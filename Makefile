SEED ?= 0
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
WORKERS ?= 2

.PHONY: demo test test-all gpu gpu-tiny results ablation-smoke lint types clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/.installed  ## DMPO on 4x4 Sudoku from the embedded base
	$(BIN)/dmpo-lightning fit --config sudoku_tiny.yaml --seed_everything $(SEED) $(ARGS)

test: .venv/.installed  ## the fast tier
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) $(ARGS)

test-all: .venv/.installed  ## everything
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

gpu: .venv/.installed  ## proves and measures on a GPU, in nine minutes
	$(BIN)/python -m benchmarks.gpu --output runs/gpu $(ARGS)

gpu-tiny: .venv/.installed  ## the same code in small, on a processor
	$(BIN)/python -m benchmarks.gpu --size tiny --output runs/gpu_tiny $(ARGS)

results: .venv/.installed  ## docs/results.md and its figures, from the table of the ablation
	$(BIN)/python -m benchmarks.ablation.results

ablation-smoke: .venv/.installed  ## four steps of one run per problem of the ablation
	rm -f runs/ablation_smoke.csv
	$(BIN)/python -m benchmarks.ablation --smoke --output runs/ablation_smoke.csv

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed
	$(BIN)/mypy

clean:
	rm -rf .venv runs dist build
