# Everything a contributor does, from nothing: each target sets up .venv when it is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: lock demo test test-slow test-portable test-oldest test-mergekit test-clusters test-mutation lint types bench study clean

demo: $(STAMP)
	$(BIN)/python experiments/quickstart/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# The numerical tests on other paths through the same libraries: no result may hang on the processor.
# (MKL heeds MKL_ENABLE_INSTRUCTIONS on Intel's processors only.) Two threads in each of two processes
# should not spin while they wait for each other.
NUMERICAL := $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/surrogates tests/pareto \
	tests/samplers tests/operators
test-portable: export OMP_WAIT_POLICY = PASSIVE
test-portable: $(STAMP)
	MAP_BO_TEST_THREADS=1 MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default $(NUMERICAL)
	MAP_BO_TEST_THREADS=2 MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default $(NUMERICAL)
	MAP_BO_TEST_THREADS=1 MKL_ENABLE_INSTRUCTIONS=SSE4_2 $(NUMERICAL)
	MAP_BO_TEST_THREADS=2 MKL_ENABLE_INSTRUCTIONS=SSE4_2 $(NUMERICAL)

# The same tests with every dependency at its declared lower bound, in an environment of its own.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[dev,huggingface]"
	.venv-oldest/bin/python -m pytest -n 2 --dist worksteal

# What map_bo and mergekit both do, compared; these tests are skipped where mergekit is missing.
test-mergekit: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[benchmark]"
	$(BIN)/python -m pytest -m "not gpu and not data" tests/operators/mergekit

# Workers on Ray and Dask clusters that the tests start on this machine, in an environment of its own:
# Hydra's launchers need an older cloudpickle than distributed does.
test-clusters:
	test -x .venv-clusters/bin/python || $(PYTHON) -m venv .venv-clusters
	sed '/^cloudpickle==/d' constraints.txt > .venv-clusters/constraints.txt
	.venv-clusters/bin/python -m pip install --quiet --constraint .venv-clusters/constraints.txt --editable ".[ray,dask]" \
		hypothesis pytest pytest-timeout
	.venv-clusters/bin/python -m pytest -m "not gpu and not data" tests/workers/test_ray.py \
		tests/workers/test_dask.py tests/workers/test_pool.py tests/workers/clusters

# Plants small bugs, one at a time, in the code that decides, and lists those that no test notices.
# Hours for all of it; an interrupted run goes on. ONLY takes a part: make test-mutation
# ONLY='map_bo.space*'. `.venv-mutation/bin/mutmut show NAME` shows one bug. What is mutated, and by
# which tests it should be noticed, stands in pyproject.toml.
test-mutation:
	test -x .venv-mutation/bin/mutmut || $(PYTHON) -m venv .venv-mutation
	.venv-mutation/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,huggingface]" mutmut==3.8.1
	OMP_NUM_THREADS=1 nice .venv-mutation/bin/mutmut run --max-children 2 $(ONLY)
	.venv-mutation/bin/mutmut results

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Regenerates every number in README.md; long, but the direct searches are kept in .bench_cache.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[benchmark]"
	$(BIN)/python -m benchmarks.run

# The study behind docs/evidence.md, every method on every case: hours, but it goes on where it was
# stopped. Image cases need MAP_BO_DATA.
study: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[benchmark]"
	$(BIN)/python -m benchmarks.quality --methods all --out benchmarks/results/quality.json

# Versions are pinned, and of all but torch the files themselves, by their hashes.
$(STAMP): pyproject.toml constraints.txt requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "map_bo needs Python 3.11 or newer; run make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch
	$(PIP) --require-hashes --no-deps --requirement requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $(STAMP)

# Writes requirements.lock anew. What torch brings along for its GPUs comes with torch.
NOT_LOCKED := torch triton $(addprefix cuda-,bindings pathfinder toolkit) $(addprefix nvidia-,cublas \
	cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse \
	cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv==0.13.9
	sed '/^#/!d' requirements.lock > .lock-header
	.venv-lock/bin/uv pip compile pyproject.toml --extra dev --extra huggingface --constraint \
		constraints.txt --generate-hashes --universal --python-version 3.11 --system-certs --no-header \
		--no-annotate $(addprefix --no-emit-package ,$(NOT_LOCKED)) --quiet --output-file .lock-body
	cat .lock-header .lock-body > requirements.lock
	rm -rf .lock-header .lock-body .venv-lock

clean:
	rm -rf $(VENV) .venv-oldest .venv-clusters .venv-mutation mutants build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
