# Every target sets up what it needs: a virtual environment in .venv with the package built and installed in place.
# Needs Python >= 3.10 with its headers and venv module, g++ and make (Debian: python3-dev python3-venv g++ make).

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SOURCES := $(wildcard csrc/*.cpp csrc/*.hpp) setup.py pyproject.toml constraints.txt

.PHONY: demo test bench lint format clean

demo: $(READY)
	$(BIN)/fastconfig demo burgers

test: $(READY)
	$(BIN)/python -m pytest

bench: $(READY)
	$(BIN)/python bench/run.py

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

$(READY): $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,test,bench,lint]"
	touch $@
