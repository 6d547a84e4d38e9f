# What can be done here? `make help`. Every target that needs the environment makes it first (once; see tools/setup.py).

VENV := .venv
PYTHON := $(VENV)/bin/python
PYTEST := $(PYTHON) -m pytest
BASE_PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

CHECKED := orchestrator migration instance bench tools tests
PRODUCT := orchestrator migration instance bench
# No Ray, no vLLM engine, nothing slow: what `make check` runs.
FAST_TESTS := $(wildcard $(addprefix tests/,unit property golden architecture exhaustive simulation contract))
FAST_MARKS := not engine and not gpu and not long
NAME ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check test-all sim golden exhaustive compat proto diagrams bench test-gpu test-v2 clean

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv and install the pinned packages and the project, once
	@if [ -z "$(BASE_PYTHON)" ]; then \
		echo "setup: Python 3.11 was not found (looked for python3.11 and python3)." >&2; \
		echo "Install it, or name it: make setup BASE_PYTHON=/path/to/python3.11" >&2; exit 2; fi
	@$(BASE_PYTHON) tools/setup.py

demo: setup ## two instances, an uneven workload, requests that move, every answer checked (ARGS="...")
	$(VENV)/bin/kvferry demo $(ARGS)

test: setup ## all tests but gpu and long ones
	@echo "fast tests (no Ray, no vLLM) ..."
	$(PYTEST) -n 2 -m "$(FAST_MARKS)" $(FAST_TESTS)
	@echo "tests with Ray and vLLM on the CPU ..."
	$(PYTEST) -m "(engine or integration or e2e) and not gpu and not long" tests || [ $$? -eq 5 ]

check: setup ## ruff, mypy --strict, import contracts, fast tests, generated files unchanged
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict $(PRODUCT)
	$(VENV)/bin/mypy --strict tools tests
	$(VENV)/bin/lint-imports --no-logo
	$(PYTEST) -q -n 2 -m "$(FAST_MARKS)" $(FAST_TESTS)
	$(PYTHON) -m tools.proto --check
	$(if $(wildcard tools/diagrams.py),$(PYTHON) -m tools.diagrams --check)

test-all: setup ## every test that needs no GPU, the long ones too, with new random examples
	$(PYTEST) -n 2 --hypothesis-profile=explore -m "$(FAST_MARKS)" $(FAST_TESTS)
	$(PYTEST) --hypothesis-profile=explore -m "(engine or integration or e2e or long) and not gpu" tests || [ $$? -eq 5 ]
	$(PYTHON) -m bench.exactness --quick

golden: setup ## write the golden traces anew; review them as a diff
	@[ -d tests/golden ] || { echo "golden: there is no tests/golden yet" >&2; exit 2; }
	$(PYTEST) tests/golden --rewrite-golden

exhaustive: setup ## explore the joint states of the migration protocol (minutes); its last line has the figures
	@[ -d tests/exhaustive ] || { echo "exhaustive: there is no tests/exhaustive yet" >&2; exit 2; }
	$(PYTEST) -n 2 --dist worksteal --show-traces tests/exhaustive

proto: setup ## generate the Python code of proto/ into orchestrator/admin/pb
	$(PYTHON) -m tools.proto

diagrams: setup ## draw the state diagrams from the tables
	$(if $(wildcard tools/diagrams.py),$(PYTHON) -m tools.diagrams,@echo "diagrams: not there yet" >&2; exit 2)

bench: setup ## run one bench: make bench NAME=downtime ARGS="--quick"
	@if [ -z "$(NAME)" ] || [ ! -f "bench/$(NAME).py" ]; then \
		echo "bench: give one of these as NAME=...:" \
			$(filter-out __init__,$(basename $(notdir $(wildcard bench/*.py)))) >&2; exit 2; fi
	$(PYTHON) -m bench.$(NAME) $(ARGS)

test-gpu: setup ## the tests that need a CUDA device (they skip, saying why, where there is none)
	$(PYTEST) -m gpu tests || [ $$? -eq 5 ]

test-v2: setup ## moves between engines with vLLM's V2 runner, as on GPUs, its kernels interpreted (fetches Triton, 190 MB)
	@[ -d $(VENV)/opt/triton ] || { echo "fetching Triton ..." && \
		$(PYTHON) -m pip install --quiet --no-deps --upgrade --target $(VENV)/opt/triton.part \
		"$$(grep '^triton==' requirements/cuda.lock)" && mv -T $(VENV)/opt/triton.part $(VENV)/opt/triton; }
	$(PYTEST) tests/integration/test_exactness_v2_runner.py

sim: setup ## the same requests to several simulated fleets: make sim ARGS="--rate 9 --arm ours --arm llumnix"
	$(VENV)/bin/kvferry simulate compare $(ARGS)

compat: setup ## what breaks with another vLLM: make compat VLLM=0.31.0 (ARGS=--names-only starts no engine)
	@if [ -z "$(VLLM)" ]; then echo "compat: name a version: make compat VLLM=0.31.0" >&2; exit 2; fi
	@$(PYTHON) -m tools.compat $(VLLM) $(ARGS)

clean: ## remove what was built, cached or written; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache demo-out bench-out
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
