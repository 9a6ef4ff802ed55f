# make quickstart   install what running needs, run configs/quickstart.yaml
# make check        lint, types and the tests that start no engine (a minute and a half)
# make test         lint, types and all tests
# make tools        build llama.cpp's own tools, which the tests marked "upstream" compare with
# make bench        time and memory against those tools
# make setup        only install; make develop: the developer's tools too
# CUDA=1            behind any of these: llama.cpp for NVIDIA's GPUs (needs CUDA's compiler, nvcc)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/quantool
LLAMA := 0.3.36
SDIST := $(CACHE)/sdist/llama_cpp_python-$(LLAMA).tar.gz
# The wheel is compiled for this processor: a home shared by several kinds of machine keeps one for each.
# With CUDA=1 it is another wheel of the same name, in folders of its own, and an installed one is replaced.
CUDA ?=
BUILT := $(if $(CUDA),-cuda)
CPU := $(shell (uname -m; grep -m1 -E 'flags|Features' /proc/cpuinfo) | cksum | cut -d' ' -f1)
PY := $(shell $(PYTHON) -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
WHEELS := $(CACHE)/wheels/$(PY)-$(CPU)$(BUILT)
WHEEL := $(WHEELS)/llama_cpp_python-$(LLAMA)-py3-none-linux_$(shell uname -m).whl
BUILD := $(CACHE)/build/$(LLAMA)-$(CPU)$(BUILT)
TOOLS := $(CACHE)/tools/$(LLAMA)
# Python's byte code is written when a module is first imported: of 17,000 files that is a small part.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder

export OMP_WAIT_POLICY := PASSIVE
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += --jobs=2  # compiling beside installing, linting beside testing
endif

.PHONY: setup develop quickstart lint unit check test tools bench clean

setup: $(VENV)/.setup$(BUILT)
develop: $(VENV)/.develop$(BUILT)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# All that pyproject.toml names but llama-cpp-python, which is compiled at the same time.
$(VENV)/.libraries: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*(d for d in p["dependencies"] + p["optional-dependencies"]["compressed"] if "llama-cpp" not in d), sep="\n")' \
	  >$@.txt
	$(PIP) --requirement $@.txt
	@touch $@

$(SDIST): | $(BIN)/python
	@mkdir -p $(@D)
	$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --no-binary llama-cpp-python \
	  --dest $(@D) llama-cpp-python==$(LLAMA)

# The library alone, half of what the wheel's own build compiles; `make tools` goes on in the same folder. Names of
# targets and options are those of llama.cpp's CMakeLists.txt; CMAKE_ARGS of the environment are passed on.
$(BUILD)/out/Makefile: | $(SDIST)
	rm -rf $(BUILD) && mkdir -p $(BUILD)
	tar -xzf $(SDIST) -C $(BUILD) --strip-components=1
	cmake -S $(BUILD)/vendor/llama.cpp -B $(BUILD)/out -G "Unix Makefiles" -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON -DCMAKE_INSTALL_RPATH='$$ORIGIN' -DLLAMA_BUILD_TESTS=OFF \
	  -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
	  -DLLAMA_OPENSSL=OFF $(if $(CUDA),-DGGML_CUDA=ON) $(CMAKE_ARGS) >$(BUILD)/log

$(WHEEL): | $(SDIST)
	@echo "compiling llama.cpp (2 minutes on two free cores)"
	$(MAKE) $(BUILD)/out/Makefile
	env -u MAKEFLAGS cmake --build $(BUILD)/out --parallel $$(nproc) --target llama >>$(BUILD)/log
	mkdir -p $(BUILD)/llama_cpp/lib $(@D)
	cp $(BUILD)/out/bin/lib*.so* $(BUILD)/llama_cpp/lib/
	CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $(BIN)/python -m pip wheel --quiet --no-deps \
	  --config-settings sdist.include='llama_cpp/lib/*' --wheel-dir $(BUILD) $(BUILD)
	mv $(BUILD)/$(@F) $@

$(VENV)/.setup$(BUILT): $(VENV)/.libraries | $(WHEEL)
	$(PIP) --force-reinstall --no-deps $(WHEEL)
	$(PIP) $(WHEEL)
	$(PIP) --editable '.[compressed]'
	$(BIN)/quantool toolchain install --sdist $(SDIST)
	@rm -f $(VENV)/.setup $(VENV)/.setup-cuda $(VENV)/.develop $(VENV)/.develop-cuda
	@touch $@

$(VENV)/.develop$(BUILT): $(VENV)/.setup$(BUILT)
	$(PIP) --editable '.[compressed,dev]'
	@touch $@

quickstart: setup
	$(BIN)/quantool configs/quickstart.yaml

lint: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint unit

unit: develop
	$(PYTEST) -m "not e2e and not upstream"

test: lint
	$(PYTEST)

tools: setup $(TOOLS)/llama-server

# llama-server is the last that cp writes.
$(TOOLS)/llama-server: | $(WHEEL)
	$(MAKE) $(BUILD)/out/Makefile
	env -u MAKEFLAGS cmake --build $(BUILD)/out --parallel $$(nproc) >>$(BUILD)/log \
	  --target llama-quantize llama-imatrix llama-perplexity llama-gguf-split llama-server
	mkdir -p $(@D)
	cp --archive $(BUILD)/out/bin/lib*.so* $(BUILD)/out/bin/llama-* $(@D)/
	rm -rf $(BUILD)

bench: develop tools
	$(BIN)/python tests/bench.py

clean:
	rm -rf $(VENV) output build *.egg-info
