# One environment for everything, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/.cli
	$(BIN)/fxfreeze compare

test: $(VENV)/.test
	$(PYTEST) -m "not slow and not gpu"

test-all: $(VENV)/.test
	$(PYTEST) -m "not gpu"

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python -m pytest bench -p no:xdist -o python_files='bench_*.py' -o python_functions='bench_*' \
		--benchmark-columns=min,median,max,stddev,rounds --benchmark-group-by=group $(if $(JSON),--benchmark-json=$(JSON))

# torch first and by its exact version: a looser requirement may pull another build.
$(VENV)/.cli: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[cli]'
	touch $@

# torchvision and timm without dependencies: torchvision's wheel asks for a torch of its own.
$(VENV)/.test: $(VENV)/.cli
	$(PIP) --editable '.[cli,cache,test]'
	$(PIP) --no-deps torchvision timm
	$(PIP) huggingface_hub PyYAML triton
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) --editable '.[cli,cache,test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
