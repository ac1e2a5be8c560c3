# Every target sets up what it needs: a virtual environment in .venv with the package built and installed in place.
# Needs Python >= 3.10 with its headers and venv module, g++ and make (Debian: python3-dev python3-venv g++ make).

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SOURCES := $(wildcard csrc/*.cpp csrc/*.hpp) setup.py pyproject.toml constraints.txt

# The oldest Triton that the kernels are to compile on; constraints.txt names the newest, which is installed.
OLDEST_TRITON := .venv/triton-3.6.0

.PHONY: demo test bench gpu kernels lint format clean

demo: $(READY)
	$(BIN)/fastconfig demo burgers

test: $(READY) $(OLDEST_TRITON)
	FASTCONFIG_OLDEST_TRITON=$(OLDEST_TRITON) $(BIN)/python -m pytest

bench: $(READY)
	$(BIN)/python bench/run.py

# On a machine with a GPU, its own python3 and PyTorch: nothing is downloaded, no virtual environment made.
gpu:
	$(PYTHON) bench/gpu.py

# What every kernel compiles to, for every architecture and on both Tritons: no GPU needed, but half an hour.
kernels: $(READY) $(OLDEST_TRITON)
	$(BIN)/python bench/compile_kernels.py
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python bench/compile_kernels.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.hpp
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.hpp

clean:
	rm -rf .venv build *.egg-info fastconfig/_core*.so

$(OLDEST_TRITON): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==3.6.0
	touch $@

$(READY): $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,test,bench,lint]"
	touch $@
