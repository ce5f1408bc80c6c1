# make pretrain      train the smoke preset on the built-in synthetic corpus (CPU, minutes)
# make test          all tests that run on two cores in minutes        make test-slow   the long ones
# make bench         every benchmark this machine can run              make lint        ruff
# The kernel tests have a run of their own, since Triton's interpreter is chosen once per process. The rest is in halves:
# the three runs go two at a time.
# Each target makes .venv and installs what it needs; a second run finds it done.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
ARGS ?=

HALF := tests/data tests/evaluation tests/csrc tests/bench tests/use

.PHONY: pretrain test test-kernels test-half test-others test-slow bench lint clean

pretrain: $(VENV)/base
	$(BIN)/dbeta-pretrain --preset smoke $(ARGS)

test: $(VENV)/full
	$(MAKE) --jobs 2 test-others test-kernels test-half

test-others:
	$(BIN)/python -m pytest $(addprefix --ignore ,tests/kernels $(HALF)) $(ARGS)

test-half:
	$(BIN)/python -m pytest $(HALF) $(ARGS)

test-kernels:
	$(BIN)/python -m pytest tests/kernels $(ARGS)

test-slow: $(VENV)/full
	$(BIN)/python -m pytest --ignore tests/kernels -m "slow and not gpu" $(ARGS)
	$(BIN)/python -m pytest tests/kernels -m "slow and not gpu" $(ARGS)

bench: $(VENV)/full
	$(BIN)/dbeta-bench all $(ARGS)

lint: $(VENV)/full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch is installed on its own first, so that the version in constraints.txt decides, and the build of the optional
# C++ parts (csrc/) sees the torch and the DALI that will load them: hence no build isolation.
$(VENV)/base: pyproject.toml constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) scikit-build-core cmake ninja
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/full: $(VENV)/base
	$(PIP) --no-build-isolation --editable ".[faiss,dali,dev]"
	$(BIN)/python -m dbeta_kernels.extension  # pip built before DALI was there
	touch $@

clean:
	rm -rf $(VENV) build
