# make quickstart   set up and run configs/quickstart.yaml
# make test         set up, lint, type-check and test
# make tools        build llama.cpp's own tools, which the tests marked "upstream" compare with (4 minutes)
# make bench        time and memory against those tools

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/quantool
LLAMA := 0.3.36
SDIST := $(CACHE)/sdist/llama_cpp_python-$(LLAMA).tar.gz
# The wheel is compiled for this processor: a home shared by several kinds of machine keeps one for each.
CPU := $(shell (uname -m; grep -m1 -E 'flags|Features' /proc/cpuinfo) | cksum | cut -d' ' -f1)
PY := $(shell $(PYTHON) -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
WHEELS := $(CACHE)/wheels/$(PY)-$(CPU)
TOOLS := $(CACHE)/tools/$(LLAMA)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup quickstart test lint tools bench clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@mkdir -p $(dir $(SDIST)) $(WHEELS)
	test -f $(SDIST) || $(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python \
	  --dest $(dir $(SDIST)) llama-cpp-python==$(LLAMA)
	ls $(WHEELS)/llama_cpp_python-$(LLAMA)-*.whl >/dev/null 2>&1 || { echo "compiling llama-cpp-python (5 minutes)"; \
	  $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(WHEELS) $(SDIST); }
	$(PIP) $(WHEELS)/llama_cpp_python-$(LLAMA)-*.whl
	$(PIP) --editable '.[compressed,dev]'
	$(BIN)/quantool toolchain install --sdist $(SDIST)
	@touch $@

quickstart: setup
	$(BIN)/quantool configs/quickstart.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

tools: setup $(TOOLS)/llama-server

# Names of targets and options are those of llama.cpp's CMakeLists.txt. llama-server is the last that cp writes.
$(TOOLS)/llama-server:
	rm -rf $(CACHE)/build && mkdir -p $(CACHE)/build/source $(TOOLS)
	tar -xzf $(SDIST) -C $(CACHE)/build/source --strip-components=3 llama_cpp_python-$(LLAMA)/vendor/llama.cpp
	cmake -S $(CACHE)/build/source -B $(CACHE)/build/out -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
	  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \
	  -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF >$(CACHE)/build/log
	cmake --build $(CACHE)/build/out --parallel $$(nproc) >>$(CACHE)/build/log \
	  --target llama-quantize llama-imatrix llama-perplexity llama-gguf-split llama-server
	cp $(CACHE)/build/out/bin/llama-* $(TOOLS)/
	rm -rf $(CACHE)/build

bench: tools
	$(BIN)/python tests/bench.py

clean:
	rm -rf $(VENV) output build *.egg-info
