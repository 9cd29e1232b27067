# One environment for everything, made on first use.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
# The same kernels in Triton's interpreter: it is chosen when triton is imported, so in a process of its own.
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) tests/kernels

.PHONY: demo test test-all aot aot-oldest lint bench bench-gpu bench-train clean

demo: $(VENV)/.cli
	$(BIN)/fxfreeze compare

test: $(VENV)/.test
	$(PYTEST) -m "not slow and not gpu"
	$(INTERPRETED) -m "not slow and not gpu"

test-all: $(VENV)/.test
	$(PYTEST) -m "not gpu"
	$(INTERPRETED) -m "not gpu"

# Every kernel's machine code, for every architecture; and by the oldest triton that is meant to work.
AOT := FXFREEZE_AOT=all OMP_NUM_THREADS=1

aot: $(VENV)/.test
	$(AOT) $(BIN)/python -m pytest -n 2 tests/kernels/test_aot.py

aot-oldest: $(OLDEST)/.aot
	$(AOT) $(OLDEST)/bin/python -m pytest -n 2 tests/kernels/test_aot.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Those that README needs most come first: what would begin after BENCH_SECONDS is left out.
SUITES := $(patsubst %,bench/bench_%.py,prefix techniques training iteration freeze cache cached_epoch)
ON_GPU := $(patsubst %,bench/bench_%.py,prefix techniques iteration kernels freeze)
MEASURE := $(BIN)/python -m pytest -p no:xdist -o python_files='bench_*.py' -o python_functions='bench_*' \
	--benchmark-columns=min,median,iqr,rounds --benchmark-group-by=group

# Of chosen suites (BENCH=bench/bench_cache.py), the figures are kept only where JSON says.
bench: $(VENV)/.test
ifdef BENCH
	$(MEASURE) $(BENCH) $(if $(JSON),--benchmark-json=$(JSON))
else
	BENCH_DEVICE=cpu BENCH_SECONDS=855 $(MEASURE) $(SUITES) --benchmark-json=$(or $(JSON),bench/results/cpu.json)
endif

bench-gpu: $(VENV)/.test
	BENCH_DEVICE=cuda BENCH_SECONDS=480 $(MEASURE) $(ON_GPU) --benchmark-json=bench/results/cuda.json

# DATA: a .npz, or the folder of torchvision's CIFAR-10; OPTIONS: see python -m bench.train --help
bench-train: $(VENV)/.test
	$(BIN)/python -m bench.train --data $(DATA) $(OPTIONS)

# torch first and by its exact version: a looser requirement may pull another build.
$(VENV)/.cli: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[cli]'
	touch $@

# torchvision and timm without dependencies: torchvision's wheel asks for a torch of its own.
$(VENV)/.test: $(VENV)/.cli
	$(PIP) --editable '.[cli,cache,openvino,int8,test]'
	$(PIP) --no-deps torchvision timm
	$(PIP) huggingface_hub PyYAML triton
	touch $@

# torch asks for one triton exactly; another goes in over it.
$(OLDEST)/.aot: pyproject.toml constraints.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(subst $(BIN),$(OLDEST)/bin,$(PIP)) torch==2.13.0 pytest pytest-xdist
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.6.0 --editable .
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) --editable '.[cli,cache,openvino,int8,test,lint]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
