# Every target makes the environment it needs: .venv, with the versions in constraints.txt.
#
#   make demo                         the main job on its embedded data, about four minutes
#   make test PYTHON=python3.12       another interpreter (3.10 to 3.13), after `make clean`
#   make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
#       On Linux, PyPI's torch brings the CUDA libraries (gigabytes). This index has the same version for a CPU alone;
#       pip prefers it where both are offered. Use .../whl/cu126 and so on for other CUDA versions.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
BENCHMARKS := $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))

.PHONY: setup demo test test-gpu test-builds check bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "crfnet needs Python 3.10 or newer, got " + sys.version.split()[0] + "; choose one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt setuptools wheel
	$(RUN) -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(RUN) recipes/voc_deeplab.py

# a process for each core, up to eight; --dist worksteal hands out neighbours together, which share what fixtures made
test: $(READY)
	$(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal

test-gpu: $(READY)
	$(RUN) -m pytest -m gpu

# all builds of all kernels, of which tests/test_gpu_builds.py tries the extremes; about ten minutes on two cores
test-builds: $(READY)
	$(RUN) -m crfnet doctor --compile

check: $(READY)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(READY)
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(RUN) $$script; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find crfnet ops recipes benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
