# Every target makes what it needs from nothing: a virtual environment, packages, the native module.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
NATIVE := setup.py build_cuda.py cuda_units.py \
	$(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.h csrc/cuda/*.cuh csrc/cuda/*.cu csrc/cuda/*.cpp)
CXX_SOURCES := $(filter-out setup.py build_cuda.py cuda_units.py,$(NATIVE)) $(wildcard python_tests/cuda_on_host/*.h)

.PHONY: demo test lint format bench gpu fuzz sanitize package clean
.DELETE_ON_ERROR:

demo: $(VENV)/built
	$(BIN)/python -m bench.digits

test: $(VENV)/built
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/built
	$(BIN)/python -m bench.sass
	$(BIN)/python -m bench.kernels --budget 300 --json bench/out/kernels.json --plot bench/out/kernels.png

# Random and bad calls of the native ops for SECONDS
SECONDS := 60
fuzz: $(VENV)/built
	mkdir -p build
	$(BIN)/python python_tests/fuzzing.py --seconds $(SECONDS) --log build/fuzz.json

# The CPU part of the suite with the native module under the compiler's sanitizers
sanitize: $(VENV)/built
	$(BIN)/python tools/sanitize.py

# Distributions in dist/, and the tests of the wheel installed in an empty environment
package: $(VENV)/built
	$(BIN)/python tools/package.py

# On a machine with a GPU, PyTorch and Triton: with its own Python, downloading nothing.
gpu:
	$(PYTHON) -m bench.gpu $(if $(RESULTS),--results $(RESULTS))

# torch first and by its exact version: a looser one would bring gigabytes of CUDA packages
$(VENV)/installed: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel pybind11 ninja
	$(PIP) triton pytest pytest-xdist hypothesis scipy scikit-learn tqdm matplotlib ruff mypy clang-format
	$(PIP) build twine check-jsonschema
	touch $@

$(VENV)/built: $(VENV)/installed $(NATIVE)
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info fogzo_kernels/*.so
