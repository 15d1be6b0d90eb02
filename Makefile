# One virtual environment for every target; each target sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
SOURCES := ftfast kernels benchmarks tests examples setup.py

.PHONY: demo test lint bench sanitize install clean

demo: $(VENV)/.demo
	$(BIN)/ftfast demo --overwrite

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n $(WORKERS) --dist loadfile --max-worker-restart 0

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy ftfast kernels
	$(BIN)/codespell README.md CHANGELOG.md CONTRIBUTING.md docs ftfast kernels csrc

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks losses
	$(BIN)/python -m benchmarks topk
	$(BIN)/python -m benchmarks weightspace

# The C++ search under AddressSanitizer and UBSan, all of its tests and 2,000 fuzz cases.
sanitize: $(VENV)/.dev
	FTFAST_FUZZ_CASES=2000 $(BIN)/python csrc/check_sanitized.py

install: $(VENV)/.dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*) | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*) | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
