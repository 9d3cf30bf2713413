# Each target makes what it needs first; a second call is quick.
#
#   make PYTHON=python3.12 install        another interpreter for the virtual environment
#   make PIP_ARGS="..." install           more arguments for pip
#   make PYTEST_ARGS="-k blocks -x" test  more arguments for pytest
#   make DEMO_ARGS="--seeds 3" demo       more arguments for the demo
#   make VERSIONS="3.12:2.8.0" test-versions   these pairs of Python and torch only

PYTHON      ?= python3
PIP_ARGS    ?=
PYTEST_ARGS ?=
DEMO_ARGS   ?=
GPU_ARGS    ?=
VERSIONS    ?=
WORKERS     ?= 2

VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed-demo
PENDING := $(VENV)/.installing
TRITON  := build/triton

# One torch thread a worker: two workers with all cores each are slower than one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help install demo results cost bench training losses gpu docs examples save-examples test test-slow test-screening test-versions test-native test-native-arm valgrind test-gpu-offline wheels lint format clean

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## make the virtual environment in .venv

demo: $(STAMP) ## train the demo models and print the table
	$(BIN)/steppe demo $(DEMO_ARGS)

results: $(STAMP) ## measure the README's table and plot anew (ten minutes)
	$(BIN)/steppe demo --seeds 3 --out runs/results
	cp runs/results/summary.json docs/results/demo.json
	$(BIN)/python docs/render.py

cost: $(STAMP) ## measure anew what measuring costs (ten minutes, nothing else running)
	$(BIN)/python benchmarks/monitor_cost.py --json benchmarks/results/monitor_cost.json
	$(BIN)/python docs/render.py

bench: $(STAMP) ## measure anew what the kernels gain (twenty minutes, nothing else running)
	$(BIN)/python benchmarks/mlp_cpu.py --json benchmarks/results/mlp_cpu.json
	$(BIN)/python benchmarks/models_cpu.py --json benchmarks/results/models_cpu.json
	$(BIN)/python docs/render.py

training: $(STAMP) ## train a small GPT on the kernels and dense anew: TEXT=FILE (half an hour)
	$(BIN)/python benchmarks/training_cpu.py '$(TEXT)' --json benchmarks/results/training_cpu.json
	$(BIN)/python docs/render.py

losses: $(STAMP) ## train the same model dense, sparse and in float64 anew, and compare (two minutes)
	$(BIN)/python benchmarks/same_losses.py --json benchmarks/results/same_losses.json
	$(BIN)/python docs/render.py

# With the interpreter that is there, whose torch knows the card: nothing is installed.
gpu: ## find out everything about a GPU in eight minutes: GPU_ARGS="--seconds 300 --out FOLDER"
	$(PYTHON) -u benchmarks/gpu.py --out runs/gpu $(GPU_ARGS)

docs: $(STAMP) ## build the site into build/docs, with nothing that it loads from elsewhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo build/docs/index.html

# In a copy, with one thread each.
examples: $(STAMP) ## run the notebooks of examples/, two at a time (three minutes)
	rm -rf build/examples && mkdir -p build && cp -r examples build/examples
	cd build/examples && ls *.ipynb | PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 \
	  xargs -P $(WORKERS) -n 1 jupyter nbconvert --execute --to notebook --inplace --ExecutePreprocessor.timeout=600

save-examples: ## run them and keep their outputs (nothing else running)
	$(MAKE) examples WORKERS=1
	cp build/examples/*.ipynb examples
	$(BIN)/jupyter nbconvert --to notebook --inplace --coalesce-streams examples/*.ipynb

test: $(STAMP) ## run the tests, without the slow ones
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(STAMP) ## run the slow tests
	$(PYTEST) -m slow $(PYTEST_ARGS)

# Not by workers: the file counts the units of all its tests, and their product has two threads.
test-screening: $(STAMP) ## screen a hundred million random units and count the missed ones: none
	$(BIN)/pytest -m slow -s tests/ops/test_many_units.py $(PYTEST_ARGS)

test-versions: $(STAMP) ## run every verb with each torch from the floor on (an hour, 10 GB to download)
	$(BIN)/python tests/versions/run.py $(VERSIONS)
	$(BIN)/python docs/render.py

# Data races are searched for with ThreadSanitizer, which comes with g++. It does not see into libgomp,
# across whose barriers all would seem to race, so tests/native/team.cpp stands in for that. Whether
# that can be built and runs here is tried first.
test-native: $(STAMP) ## test the kernels in C++, each instruction set, plain and with sanitizers
	@mkdir -p build; \
	echo 'int main() { int n = 0;' \
	  '_Pragma("omp parallel num_threads(2)") { _Pragma("omp atomic") n += 1; } return n != 2; }' \
	  > build/race-probe.cpp; \
	for flags in "" address,undefined thread; do \
	  if [ "$$flags" = thread ] && ! { $${CXX:-c++} -std=c++17 -fsanitize=thread -fopenmp -c \
	      build/race-probe.cpp -o build/race-probe.o && $${CXX:-c++} -std=c++17 -fsanitize=thread \
	      build/race-probe.o tests/native/team.cpp -o build/race-probe && build/race-probe; \
	    } > build/race-probe.log 2>&1; then \
	    echo "no search for data races: g++ with ThreadSanitizer does not run here (build/race-probe.log)"; \
	    continue; \
	  fi; \
	  build=build/native-tests$${flags:+-$${flags%%,*}}; \
	  $(BIN)/cmake -S src/steppe/native -B $$build -DSTEPPE_TESTS=ON -DSTEPPE_SANITIZE=$$flags \
	    && $(BIN)/cmake --build $$build --parallel $(WORKERS) \
	    && $(BIN)/ctest --test-dir $$build --output-on-failure --parallel $(WORKERS) || exit 1; \
	done

valgrind: test-native ## run the same under valgrind, which knows instruction sets up to avx2
	@for isa in portable avx2; do \
	  STEPPE_ISA=$$isa valgrind --quiet --error-exitcode=1 build/native-tests/kernels_test || exit 1; \
	done

# Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user
ARM := build/native-arm
test-native-arm: $(STAMP) ## build the kernels for aarch64 and test them under qemu (ten minutes)
	$(BIN)/cmake -S src/steppe/native -B $(ARM) -DSTEPPE_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux \
	  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	  "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu"
	$(BIN)/cmake --build $(ARM) --parallel $(WORKERS)
	$(BIN)/ctest --test-dir $(ARM) --output-on-failure

# Triton is interpreted in the first process and compiles for GPUs that are not there in the second.
test-gpu-offline: $(TRITON)/.installed ## test the GPU kernels without a GPU (Linux; 190 MB to download)
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(PYTEST) $(PYTEST_ARGS) \
	  tests/ops/cuda/test_interpreter.py tests/ops/cuda/test_pack.py tests/ops/cuda/test_packing.py \
	  tests/ops/cuda/test_decode.py tests/ops/cuda/test_decode_tokens.py tests/ops/cuda/test_dispatch.py
	PYTHONPATH=$(TRITON) $(PYTEST) $(PYTEST_ARGS) tests/ops/cuda/test_ahead.py

# Not into the environment: torch looks for Triton and takes other paths where it finds it, and the
# other tests should see what users of a CPU build have.
$(TRITON)/.installed: tests/ops/cuda/requirements.txt | $(STAMP)
	rm -rf $(TRITON)
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps --target $(TRITON) -r $<
	@touch $@

# Built from the sdist. A wheel of Linux holds the kernels and runs with the glibc of 2018 and newer
# ones, which auditwheel finds out and `ls` looks for. The last one is for other systems, which have no
# kernels.
# Debian, Ubuntu: apt install g++-aarch64-linux-gnu
WHEEL := $(BIN)/python -m build --wheel --outdir build/wheels build/wheels/source
wheels: $(STAMP) ## build in dist/ what is published: the sdist, wheels for Linux on x86-64 and aarch64, and for elsewhere
	rm -rf dist build/wheels
	$(BIN)/python -m build --sdist --outdir dist
	mkdir -p build/wheels/source && tar -xf dist/steppe-*.tar.gz -C build/wheels/source --strip-components 1
	for machine in x86_64 aarch64; do \
	  _PYTHON_HOST_PLATFORM=linux-$$machine SKBUILD_BUILD_DIR=$(CURDIR)/build/wheels/$$machine \
	  SKBUILD_CMAKE_DEFINE="STEPPE_LINK_OPENMP=OFF;CMAKE_SYSTEM_NAME=Linux;CMAKE_SYSTEM_PROCESSOR=$$machine;CMAKE_CXX_COMPILER=$$machine-linux-gnu-g++" \
	  $(WHEEL) \
	  && PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --plat auto --wheel-dir dist \
	    build/wheels/steppe-*-linux_$$machine.whl \
	  && ls dist/steppe-*-manylinux_2_2[0-8]_$$machine.whl || exit 1; \
	done
	SKBUILD_WHEEL_CMAKE=false SKBUILD_WHEEL_PY_API= $(WHEEL)
	cp build/wheels/steppe-*-any.whl dist
	@ls dist

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy src

format: $(STAMP) ## rewrite the files as lint wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove everything that is not source
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted install is taken up again by the next call. What a
# killed pip leaves behind looks installed and is not, and a half-made environment lets pip into the
# base interpreter: both are made anew. After Ctrl-C the trap keeps bash from going on to the `rm`.
$(STAMP): pyproject.toml constraints.txt $(wildcard src/steppe/native/*)
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "steppe needs Python >= 3.10 with the venv module, and '$(PYTHON)' is not that:" \
	       "install it (on Debian and Ubuntu: apt install python3-venv)," \
	       "or name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test ! -e $(PENDING) \
	  && $(BIN)/python -c 'import pip, sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null \
	  || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	@touch $(PENDING)
	trap 'exit 130' INT; $(BIN)/python -m pip --require-virtualenv install \
	  -c constraints.txt $(PIP_ARGS) -e '.[demo,peft,test,dev,docs,examples]' || { rm -f $(PENDING); exit 1; }
	@mv $(PENDING) $@
