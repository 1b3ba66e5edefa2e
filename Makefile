# `make demo` trains, evaluates and audits on OpenMoji; `make test` tests; both make the environment first.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo env test test-slow lint bench clean

env: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	@python=$$($(SHELL) .ci/find-python $(PYTHON)) && echo "$$python -m venv $(VENV)" && "$$python" -m venv $(VENV)
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
