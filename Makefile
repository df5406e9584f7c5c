# Every target makes what it needs from nothing: a virtual environment, packages, the native module.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
NATIVE := setup.py build_cuda.py cuda_units.py \
	$(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.h csrc/cuda/*.cuh csrc/cuda/*.cu csrc/cuda/*.cpp)
CXX_SOURCES := $(filter-out setup.py build_cuda.py cuda_units.py,$(NATIVE)) \
	$(wildcard python_tests/ptx/executor/*.h python_tests/ptx/executor/*.cpp python_tests/ptx/cuda/*.cpp)

# What a target needs beside torch and the build tools; pyproject.toml has the same as extras
demo_PACKAGES := scikit-learn tqdm matplotlib tensorboard mlxtend
triton_PACKAGES := triton
transformers_PACKAGES := transformers
loops_PACKAGES := accelerate lightning peft
export_PACKAGES := numpy safetensors compressed-tensors gguf torchao
cuda_PACKAGES := nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-nvvm
test_PACKAGES := pytest pytest-xdist hypothesis numpy scipy safetensors
llama-cpp_PACKAGES := llama-cpp-python
lint_PACKAGES := ruff mypy clang-format check-jsonschema
docs_PACKAGES := sphinx myst-parser furo
package_PACKAGES := build twine
TESTED := test triton transformers loops export demo cuda
TESTABLE := $(VENV)/built $(VENV)/has-all-tested

.PHONY: demo test test-modes test-oldest test-gguf lint format bench gpu fuzz sanitize docs package clean
.DELETE_ON_ERROR:
MAKEFLAGS += -j2  # packages are installed while the native module is built
unexport PYTHONDONTWRITEBYTECODE  # the tests start many processes

demo: $(VENV)/built $(VENV)/has-demo
	$(BIN)/python -m bench.evidence.mlp

# The compiled GPU kernels run on the CPU (python_tests/ptx). One test at a time to each worker, the long ones first
test: $(TESTABLE)
	PYTHONPATH=python_tests $(BIN)/python -m ptx.build
	$(BIN)/python -m pytest -n auto --maxschedchunk 1 --durations 10

# The compiled GPU kernels once in each mode of the executor but the default one
MODES := ORDER=1 APPROXIMATE=1 APPROXIMATE=-1 APPROXIMATE=2 FUSE=1 FUSE=2 SCALARS=device ARCH=80 ARCH=100
KERNEL_TESTS := vectors agreement ops update learned measure alphas hadamard transform special_values spans presets
test-modes: $(TESTABLE)
	for mode in $(MODES); do echo "FOGZO_PTX_$$mode"; \
	  env FOGZO_PTX_$$mode $(BIN)/python -m pytest -q -n auto --maxschedchunk 1 -k "triton or cuda" \
	  $(KERNEL_TESTS:%=python_tests/test_%.py) || exit 1; done

# The oldest torch that pyproject.toml allows, in an environment of its own: the native module is built with its
# headers, and runs the tests of the `cpu` backend. They are copied, so that nothing of the checkout is imported.
OLDEST := build/oldest
OLDEST_TORCH := 2.11.0
OLDEST_TESTS := cpu native learned_native vectors ops update measure
test-oldest: $(OLDEST)/base
	rm -rf $(OLDEST)/package $(OLDEST)/tests
	FOGZO_BUILD_CUDA=0 $(OLDEST)/bin/python setup.py -q build \
	  --build-temp $(OLDEST)/temp --build-lib $(OLDEST)/package
	cp -r python_tests $(OLDEST)/tests
	cp cuda_units.py $(OLDEST)
	PYTHONPATH=$(CURDIR)/$(OLDEST)/package $(OLDEST)/bin/pytest -q -n auto -o pythonpath= -k "cpu or native" \
	  $(OLDEST_TESTS:%=$(OLDEST)/tests/test_%.py)

# torch says itself which setuptools and Triton go with it
$(OLDEST)/base: constraints.txt Makefile
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	grep -vE '^(torch|setuptools|triton)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt \
	  torch==$(OLDEST_TORCH) setuptools wheel pybind11 ninja $(test_PACKAGES)
	touch $@

# llama.cpp is built for it, which takes minutes
test-gguf: $(TESTABLE) $(VENV)/has-llama-cpp
	$(BIN)/python -m pytest -s python_tests/test_llama_cpp.py

lint: $(VENV)/has-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(VENV)/has-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/built $(VENV)/has-triton $(VENV)/has-demo
	$(BIN)/python -m bench.sass
	$(BIN)/python -m bench.executed
	$(BIN)/python -m bench.kernels --budget 300 --json bench/out/kernels.json --plot bench/out/kernels.png

# Random and bad calls of the native ops, and random training loops, for SECONDS each
SECONDS := 60
fuzz: $(TESTABLE)
	mkdir -p build
	PYTHONPATH=.:python_tests $(BIN)/python -m support.fuzzing --seconds $(SECONDS) --log build/fuzz.json
	PYTHONPATH=.:python_tests $(BIN)/python -m support.loops --seconds $(SECONDS) --seed $$(date +%s)

# The CPU part of the suite with the native module under the compiler's sanitizers
sanitize: $(TESTABLE)
	$(BIN)/python tools/sanitize.py

# The site in build/docs/html, anew, with warnings as errors. Without a network nothing is missing in it.
# DOCS_SOURCE_URL, where set, is where the repository's files are shown: https://.../blob/main/
docs: $(VENV)/base $(VENV)/has-docs $(VENV)/has-transformers $(VENV)/has-loops
	rm -rf build/docs
	$(BIN)/python -m sphinx -W --keep-going -n -q -d build/docs/doctrees docs build/docs/html
	$(BIN)/python tools/check_site.py build/docs/html

# Distributions in dist/, and the tests of the wheel installed in an empty environment
package: $(VENV)/has-package
	$(BIN)/python tools/package.py

# On a machine with a GPU, PyTorch and Triton: with its own Python, downloading nothing. All goes to the folder
# RESULTS, in at most BUDGET seconds, 540 by default; COMMIT names the sources where git is not at hand
gpu:
	$(PYTHON) -m bench.gpu $(if $(RESULTS),--results $(RESULTS))

# torch first and by its exact version: a looser one would bring gigabytes of CUDA packages
$(VENV)/base: constraints.txt
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit('PYTHON must be Python 3.11 or newer, got %d.%d' % v)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel pybind11 ninja
	touch $@

$(VENV)/has-all-tested: $(VENV)/base
	$(PIP) $(foreach name,$(TESTED),$($(name)_PACKAGES))
	touch $(TESTED:%=$(VENV)/has-%) $@

$(VENV)/has-%: $(VENV)/base
	$(PIP) $($*_PACKAGES)
	touch $@

$(VENV)/built: $(VENV)/base pyproject.toml $(NATIVE)
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info fogzo_kernels/*.so
