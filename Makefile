PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
STAMP := $(VENV)/.installed
EXTRAS := $(VENV)/.extras

.DEFAULT_GOAL := help
.PHONY: help install demo test lint clean

help:  ## show these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv and install the package with its tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11; use: make install PYTHON=python3.11"; exit 1; }
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	@touch $@

$(EXTRAS): $(STAMP)
	@echo "Adding the extras 'hub', 'app' and 'video' for the tests of diffusers, the page and MP4 files,"
	@echo "and torch-fidelity, without its torchvision, for those of the scores"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev,hub,app,video]'
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --no-deps torch-fidelity
	@touch $@

demo: install  ## train the two 400-layer twins on real digits and draw demo.png and report.html
	@$(VENV)/bin/mvsplit demo

test: install $(EXTRAS) lint  ## lint, then all tests that need no GPU
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

lint: install  ## ruff and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

clean:  ## remove caches and the demo's output; keeps .venv and runs
	@rm -rf .pytest_cache .ruff_cache .mypy_cache build dist demo.png demo.json report.html
	@find mvsplit tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
