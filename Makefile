# Two commands for everybody: `make perf` measures this machine, `make test` tests the project itself.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: perf test check clean

perf: .venv/installed
	$(BIN)/python -m pytest perf_tests $(ARGS)

test: .venv/installed-dev
	$(BIN)/python -m pytest tests $(ARGS)

check: .venv/installed-dev
	scripts/check

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("pytest-gpuperf needs Python 3.11 or newer, this is %s. Try: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[torch,xdist]'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[torch,xdist,dev]'
	touch $@

clean:
	rm -rf .venv .gpuperf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
