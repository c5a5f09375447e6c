# make demo | test | lint | bench | sanitize | gpu-check. Each sets up what it needs, the virtual environment included.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt setup.py pyproject.toml constraints.txt $(shell find csrc -type f)
PYTEST_ARGS ?=

.PHONY: demo test lint bench sanitize gpu-check clean

demo: $(VENV)/.demo
	$(BIN)/mpo-ext demo

test: $(VENV)/.dev
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.logits

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
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(BIN)/python $(NATIVE)
	MPO_WERROR=ON $(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.demo
