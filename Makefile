# make run    environment, real weights, an answer    (PROMPT="..." BACKEND=reference|torch)
# make test   environment, the whole test suite
# make check  lint, types, tests
# make clean  remove the environment and what was built; fetched weights stay in the user's cache
#
# PYTHON=python3.12 picks the interpreter, TORCH=cpu|cuda|none the build of PyTorch (tools/bootstrap.py).

PYTHON ?= python3
BIN := .venv/bin
export TORCH ?= auto
READY := .venv/.ready-$(TORCH)
export PROMPT ?= What is the capital of France?
BACKEND ?= auto

.PHONY: run test check clean

run: $(READY)
	@$(BIN)/llama generate --backend "$(BACKEND)" -- "$$PROMPT"

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

$(READY): pyproject.toml constraints.txt tools/bootstrap.py
	$(PYTHON) tools/bootstrap.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
