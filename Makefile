# make demo | test | lint | docs | bench | sanitize | gpu-check. Each sets up what it needs, the virtual environment included.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt setup.py pyproject.toml constraints.txt $(shell find csrc -type f)
PYTEST_ARGS ?=
# Most tests keep to one thread. A process gets a run of neighbouring tests, which share fixtures and oracles.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test lint docs bench sanitize gpu-check clean

demo: $(VENV)/.demo
	$(BIN)/mpo-ext demo

test: $(VENV)/.dev
	TRITON_INTERPRET=1 $(PYTEST) tests/triton
	$(PYTEST) $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

# The site, in build/site. Reads the docstrings from the source: needs neither torch nor the built package.
docs: $(BIN)/python
	$(BIN)/pip install --quiet 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.27'
	$(BIN)/mkdocs build --strict

# Measures for about twenty minutes, on a machine that should do nothing else; writes results/ and the marked blocks of
# README.md and docs/.
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks --docs

# All that needs a GPU; leaves a report in gpu-report/.
gpu-check: $(VENV)/.dev
	$(BIN)/python -m benchmarks.gpu_check

# Address and undefined behaviour, then threads, over the native code and its tests.
sanitize: $(VENV)/.dev
	for kind in address,undefined thread; do \
	  $(BIN)/cmake --fresh -G Ninja -S . -B build/sanitize-$$kind -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DMPO_CUDA=OFF -DMPO_PYTHON=OFF -DMPO_NATIVE_TESTS=ON -DMPO_WERROR=ON -DMPO_SANITIZE=$$kind && \
	  $(BIN)/cmake --build build/sanitize-$$kind && build/sanitize-$$kind/native_tests || exit 1; \
	done

clean:
	rm -rf build dist *.egg-info mpo_ext/*.so demo-out

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps are made again when the native code or the requirements change.
$(VENV)/.demo: $(BIN)/python $(NATIVE)
	@echo "Installing and compiling, for CUDA too where nvcc is on PATH (MPO_CUDA=OFF leaves that out): some minutes"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

# Peers that need other versions of their dependencies must not change ours.
$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/pip install --quiet --no-deps -c constraints.txt 'cut-cross-entropy>=25.1' 'liger-kernel>=0.8' 'trl>=1.15'
	touch $@

$(VENV)/.dev: $(BIN)/python $(NATIVE)
	MPO_WERROR=ON $(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.demo
