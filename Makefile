# Every target sets up what it needs: a virtual environment in .venv with the package built and installed in place.
# Needs Python >= 3.10 with its headers and venv module, g++ and make (Debian: python3-dev python3-venv g++ make).

PYTHON ?= python3
# TORCH=installed: use the PyTorch that $(PYTHON) has instead of downloading one.
TORCH ?=
BIN := .venv/bin
CPP := csrc/*.cpp csrc/*.hpp tests/core/*.cpp tests/core/*.hpp tests/ptx/machine/*.cpp tests/ptx/machine/*.hpp tests/ptx/*.c
SOURCES := $(wildcard csrc/*.cpp csrc/*.hpp) setup.py pyproject.toml constraints.txt .ci/set-up

# What the demo needs; and what work on the library does, which holds all of that.
DEVELOPED := .venv/.developed
SHOWN := $(if $(wildcard $(DEVELOPED)),$(DEVELOPED),.venv/.shown)

# The oldest and the newest Triton that the kernels are to compile on; PyTorch itself brings one in between.
OLDEST_TRITON := .venv/triton-3.6.0
NEWEST_TRITON := .venv/triton-3.9.0
TRITONS := FASTCONFIG_OLDEST_TRITON=$(OLDEST_TRITON) FASTCONFIG_NEWEST_TRITON=$(NEWEST_TRITON)

# The tests of the kernels; the emulator of tests/ptx runs them as they are compiled for an NVIDIA GPU.
OF_KERNELS := tests/ptx tests/test_triton.py tests/test_two_float.py tests/test_triton_rules.py \
  tests/test_momentum_triton.py tests/test_graddrop.py
PYTEST := $(BIN)/python -m pytest --numprocesses=auto

.PHONY: demo test bench gpu ptx kernels matrix sanitize fuzz lint format clean

demo: $(SHOWN)
	$(BIN)/fastconfig demo burgers

# Each test of a kernel once: those marked `emulated` as the kernel compiles, the others by Triton's interpreter.
test: $(DEVELOPED) $(OLDEST_TRITON) $(NEWEST_TRITON)
	$(TRITONS) FASTCONFIG_TRITON=$(NEWEST_TRITON) $(PYTEST) -m 'not emulated'
	FASTCONFIG_EMULATE=sm_90 FASTCONFIG_TRITON=$(NEWEST_TRITON) $(PYTEST) -m emulated $(OF_KERNELS)

bench: $(DEVELOPED)
	$(BIN)/python bench/run.py

# On a machine with a GPU, its own python3 and PyTorch: nothing is downloaded, no virtual environment made.
gpu:
	$(PYTHON) bench/gpu.py

# All tests of the kernels on the emulator, for two architectures and by both Tritons: no GPU needed, but half an hour.
ptx: $(DEVELOPED) $(OLDEST_TRITON) $(NEWEST_TRITON)
	set -e; for triton in $(OLDEST_TRITON) $(NEWEST_TRITON); do for gpu in sm_90 sm_89; do \
	  FASTCONFIG_EMULATE=$$gpu FASTCONFIG_TRITON=$$triton $(PYTEST) $(OF_KERNELS); done; done

# What every kernel compiles to, for every architecture and on both Tritons: no GPU needed, but half an hour.
kernels: $(DEVELOPED) $(OLDEST_TRITON) $(NEWEST_TRITON)
	PYTHONPATH=$(NEWEST_TRITON) $(BIN)/python bench/compile_kernels.py
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python bench/compile_kernels.py

# The tests on the PyTorchs that pyproject.toml lists under [tool.tox], each with a Python of its own: some gigabytes a
# PyTorch, ten minutes a row. ENV=torch24 takes one of them.
matrix: $(DEVELOPED)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[matrix]'
	TOX_DISCOVER="$$(bash .ci/pythons | paste -sd:)" $(BIN)/tox run $(if $(ENV),-e $(ENV))

# The compiled core under the compilers' sanitizers, without Python and beneath it. QUICK=1: a minute, what CI does.
sanitize: $(DEVELOPED)
	QUICK=$(QUICK) bash .ci/sanitize

# Random inputs, EXAMPLES of them for most properties, others every time: 65000 are a million in all.
EXAMPLES ?= 2000
fuzz: $(DEVELOPED)
	FASTCONFIG_FUZZ=$(EXAMPLES) $(PYTEST) tests/test_fuzz.py

lint: $(DEVELOPED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(DEVELOPED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf .venv .tox build *.egg-info fastconfig/_core*.so

# Whatever changes in the sources, a Triton that is there is the one that is wanted.
.venv/triton-%: | $(DEVELOPED)
	$(BIN)/python -m pip install --no-deps --target $@ triton==$*
	touch $@

.venv/.shown: $(SOURCES)
	TORCH=$(TORCH) TARGET='$(or $(MAKECMDGOALS),demo)' $(PYTHON) .ci/set-up demo
	touch $@

$(DEVELOPED): $(SOURCES)
	TORCH=$(TORCH) TARGET='$(or $(MAKECMDGOALS),demo)' $(PYTHON) .ci/set-up demo,test,bench,lint
	touch $@
