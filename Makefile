# Each target creates the environment that it needs; only Python 3.10+ and make are required.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

.PHONY: demo test lint docs wheel clean

demo: $(VENV)/.product  ## convert the embedded emoji model in five ways and compare images; writes demo/demo.png
	$(BIN)/convert_to_quant demo -o demo

test: $(VENV)/.test  ## run the tests
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest $(TESTS)

lint: $(VENV)/.dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs  ## build the documentation site in build/site; warnings are errors
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs build/site

wheel: | $(VENV)/bin/python  ## build a wheel in dist and print the command that installs it
	rm -f dist/calibrated_quant-*.whl
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	@echo python -m pip install dist/calibrated_quant-*.whl

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.product: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo 'installing the package and its dependencies (torch, diffusers, ...) into $(VENV), once; this takes minutes.'
	@echo 'The demo itself takes a minute or two.'
	$(PIP) --editable .
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo
