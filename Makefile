# make run    environment, real weights, an answer    (PROMPT="..." BACKEND=reference|torch)
# make test   environment, the whole test suite
# make check  lint, types, tests
# make clean  remove the environment and what was built; fetched weights stay in the user's cache
#
# PYTHON=python3.12 picks the interpreter, TORCH=cpu|cuda|none the build of PyTorch (tools/bootstrap.py).

PYTHON ?= python3
PROMPT ?= What is the capital of France?
BACKEND ?= auto
TORCH ?= auto
# Taken as typed, a $ in a prompt too, and handed on in the environment: neither make nor the shell may read it.
override PROMPT := $(value PROMPT)
override BACKEND := $(value BACKEND)
export PROMPT BACKEND TORCH

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
READY := .venv/.ready-$(TORCH)

.PHONY: run test check clean has-tools tritons

run: $(READY)
	@$(BIN)/llama generate --backend "$$BACKEND" -- "$$PROMPT"

test: has-tools tritons
	$(PYTEST)

check: has-tools tritons
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

has-tools: $(READY)
	@test -x $(BIN)/pytest || { echo "TORCH=none leaves the tests' tools out; run without it"; exit 2; }

$(READY): pyproject.toml constraints.txt tools/bootstrap.py
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) is not there; make PYTHON=... names another Python"; exit 2; }
	@$(PYTHON) tools/bootstrap.py

# Both ends of the range of Triton that tests/test_static.py compiles the kernels with. There are wheels for Linux alone.
ifeq ($(shell uname -s),Linux)
tritons: .venv/triton-3.6.0 .venv/triton-3.9.0
endif

.venv/triton-%: | $(READY)
	rm -rf $@.partial
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.partial triton==$*
	mv $@.partial $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
