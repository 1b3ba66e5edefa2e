# `make demo` trains, evaluates and audits on OpenMoji; `make test` tests; both make the environment first.
PYTHON ?= $(or $(shell for p in python3.11 python3.10 python3; do $$p -c 'import sys' >/dev/null 2>&1 && { echo $$p; break; }; done),python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo env test test-slow lint bench clean

env: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 10), (3, 11)) or sys.exit("cmfg-dgl needs Python 3.10 or 3.11, and $(PYTHON) is %d.%d: run make PYTHON=/path/to/python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt setuptools packaging
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: env
	$(BIN)/cmfg train -c configs/openmoji.yaml -o runs/openmoji --resume auto
	$(BIN)/cmfg eval runs/openmoji --split test
	$(BIN)/cmfg audit runs/openmoji
	@echo "Report: $(CURDIR)/runs/openmoji/report.html"

test: env
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: env
	$(BIN)/python -m pytest -m slow

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: env
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
