# make demo, make test and so on: each creates .venv first if it is needed (about 11 GB and 7 minutes, once).
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := $(BIN)/python -W ignore::DeprecationWarning -m pytest

.PHONY: demo test lint docs stress bench clean

demo: $(STAMP)
	$(BIN)/python -m sgl_flowprefill.bench demo

test: $(STAMP)
	$(PYTEST) -n 2  # tests/conftest.py says what runs beside what

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build  # into out/docs; strict, as mkdocs.yml says

stress: $(STAMP)
	$(PYTEST) -n 2 -rP -m "stress and not alone"
	$(PYTEST) -s -m "stress and alone"

bench: $(STAMP)
	$(BIN)/python -m sgl_flowprefill.bench uncontended

clean:
	rm -rf .venv out build dist *.egg-info .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here: install Python 3.11 or newer, or run make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$$($(PYTHON) --version) is too old: this needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: python3-venv)"; exit 1; }
	@echo "Installing into .venv: about 11 GB, several minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@
