SEED ?= 0
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
WORKERS ?= 2

.PHONY: demo picture test test-all gpu gpu-tiny results ablation-smoke docs wheel-test lint types clean

# What the demo needs. What the tests need on top of it takes longer to install, and compilers for some of it.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.installed-dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch .venv/.installed $@

.venv/.installed-docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch .venv/.installed $@

demo: .venv/.installed  ## DMPO on 4x4 Sudoku from the embedded base
	$(BIN)/dmpo-lightning fit --config sudoku_tiny.yaml --seed_everything $(SEED) $(ARGS)

picture: demo  ## the demo's learning curve and a puzzle of it, as README shows them
	cp runs/sudoku_tiny/latest/learning_curve.png docs/images/sudoku_tiny.png
	$(BIN)/python examples/denoising_svg.py runs/sudoku_tiny/latest docs/images/denoising.svg

test: .venv/.installed-dev  ## the core tier: three minutes
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal $(ARGS)

test-all: .venv/.installed-dev  ## everything
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

gpu: .venv/.installed-dev  ## proves and measures on a GPU, in nine minutes
	$(BIN)/python -m benchmarks.gpu --output runs/gpu $(ARGS)

gpu-tiny: .venv/.installed-dev  ## the same code in small, on a processor
	$(BIN)/python -m benchmarks.gpu --size tiny --output runs/gpu_tiny $(ARGS)

results: .venv/.installed  ## docs/results.md and its figures, from the table of the ablation
	$(BIN)/python -m benchmarks.ablation.results

ablation-smoke: .venv/.installed  ## four steps of one run per problem of the ablation
	rm -f runs/ablation_smoke.csv
	$(BIN)/python -m benchmarks.ablation --smoke --output runs/ablation_smoke.csv

docs: .venv/.installed-docs  ## the site, in docs/_build; DMPO_DOCS_ONLINE=1 links to the pages of torch, Lightning and transformers
	$(BIN)/python -m sphinx --quiet -W -n --keep-going docs docs/_build $(ARGS)

# With the newest versions tests/cli/test_shipped.py does it.
wheel-test: .venv/.installed-dev  ## the wheel trains with the lowest versions that pyproject.toml allows, of torch that of constraints.txt
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	sed -n '/^dependencies/,/^]/s/^  "\([a-z]*\)[^>]*>=\([0-9.]*\).*/\1==\2/p' pyproject.toml | grep -v ^torch== > dist/lowest.txt
	$(PYTHON) -m venv dist/lowest
	dist/lowest/bin/pip install --quiet --constraint dist/lowest.txt --constraint constraints.txt dist/*.whl
	mkdir dist/empty && cd dist/empty && ../lowest/bin/dmpo-lightning fit --config sudoku_tiny.yaml --trainer.max_steps 4 \
		--trainer.val_check_interval 4 --data.sizes '{train: 512, validation: 16, test: 16}'

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed-dev
	$(BIN)/mypy

clean:
	rm -rf .venv runs dist build docs/_build
