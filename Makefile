# Two commands on a machine that has only Python 3.11 or newer and make:
#   make demo   environment + the main job on the shipped pipeline -> demo-output/index.html
#   make test   environment + all tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo-output

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

$(VENV)/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ld_pruner_hf needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[select,plot]'
	@touch $@

$(VENV)/.tests: $(VENV)/.demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[select,plot,train,app,eval,audio,ecosystem,dev]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/ld-pruner demo --output $(OUT)

test: $(VENV)/.tests
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info
