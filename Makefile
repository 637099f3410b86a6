# make run    set up, download the weights and answer a prompt    (PROMPT="..." BACKEND=reference|torch)
# make test   set up and run all tests
# make check  lint, types, tests
# make bench  measure the kernels and the model against their peers and write a report    (MODEL=... RESULTS=folder)
# make clean  remove the environment and build outputs; downloaded weights stay in the user's cache
#
# PYTHON=python3.12 selects the interpreter, TORCH=cpu|cuda|none the build of PyTorch (tools/bootstrap.py).

PYTHON ?= python3
PROMPT ?= What is the capital of France?
BACKEND ?= auto
TORCH ?= auto
MODEL ?= smollm2
RESULTS ?= build/bench
# Taken literally, even a $, and passed on in the environment, so that neither make nor the shell expands it.
override PROMPT := $(value PROMPT)
override BACKEND := $(value BACKEND)
export PROMPT BACKEND TORCH

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
READY := .venv/.ready-$(TORCH)

.PHONY: run test check bench clean has-tools tritons

run: $(READY)
	@$(BIN)/llama generate --backend "$$BACKEND" -- "$$PROMPT"

test: has-tools tritons .venv/browser
	$(PYTEST)

check: has-tools tritons .venv/browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

# Everything on a GPU, a few minutes' worth elsewhere. If a step fails, the rest still runs.
# RESULTS=benchmarks/results also updates the README's tables.
bench: has-tools
	@mkdir -p $(RESULTS)
	@$(BIN)/llama fetch $(MODEL)
	-@$(BIN)/llama bench kernels $(if $(HAS_GPU),,--quick) --out $(RESULTS)
	-@$(BIN)/llama bench model $(MODEL) $(if $(HAS_GPU),--dtype bfloat16,--threads 1 --prompt 512 --new 32 --batch 1,2 --runs 3) \
		--out $(RESULTS)
ifeq ($(shell uname -s),Linux)
	@echo "Compiling the kernels for an H100 (none is needed)"
	-@$(BIN)/llama bench static --target sm_90 --json > $(RESULTS)/static.partial
	@if test -s $(RESULTS)/static.partial; then mv $(RESULTS)/static.partial $(RESULTS)/static.jsonl; \
		else rm $(RESULTS)/static.partial; fi
endif
	@$(BIN)/llama bench report --results $(RESULTS) --results benchmarks/results --out $(RESULTS)/report.html
	@$(if $(filter benchmarks/results,$(RESULTS)),$(BIN)/python -m benchmarks.tables,:)

HAS_GPU = $(shell $(BIN)/python -c "import torch; print('yes' if torch.cuda.is_available() else '')")

has-tools: $(READY)
	@test -x $(BIN)/pytest || { echo "TORCH=none omits the test tools; run without it"; exit 2; }

$(READY): pyproject.toml constraints.txt tools/bootstrap.py
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) was not found; choose another with make PYTHON=..."; exit 2; }
	@$(PYTHON) tools/bootstrap.py

# The oldest and newest Triton that tests/test_static.py compiles the kernels with. There are wheels for Linux only.
ifeq ($(shell uname -s),Linux)
tritons: .venv/triton-3.6.0 .venv/triton-3.9.0
endif

.venv/triton-%: | $(READY)
	rm -rf $@.partial
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.partial triton==$*
	mv $@.partial $@

# The browser in which tests/test_bench_report.py opens the report: Chromium, a 200 MB download.
.venv/browser: | $(READY)
	rm -rf $@.partial
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@.partial \
		pyqt6==6.11.0 pyqt6-webengine==6.11.0 pyqt6-qt6==6.11.2 pyqt6-webengine-qt6==6.11.2 pyqt6-sip==13.13.0
	mv $@.partial $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
