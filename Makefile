PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help env demo test slow chaos bench lint docs lock clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

env: $(STAMP)  ## the environment, in .venv

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "Python 3.11 to 3.13 is needed, this is %d.%d: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: env  ## make a small catalog, score it, print the table
	$(BIN)/python -m jobs.demo

# Two at a time, for much of a test of Ray is waiting. Files in their order: the longest come first.
test: env lint  ## lint, types, and all tests but the slow ones
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

slow: env  ## tests that take minutes each: kills on a cluster, a failing store, submitted jobs
	$(BIN)/python -m pytest -q -m slow

chaos: env  ## 50 seeded kills and 2,000 mutated files; an hour
	TOPIQ_KILLS=50 TOPIQ_FUZZ=2000 $(BIN)/python -m pytest -q \
	  tests/cluster/test_kills.py tests/pipeline/media/test_fuzz.py

bench: env  ## the benchmarks of speed; results in benchmarks/results
	$(BIN)/python benchmarks/startup.py --json benchmarks/results/startup.json
	$(BIN)/python benchmarks/decode.py --json benchmarks/results/decode.json
	$(BIN)/python benchmarks/guard.py
	$(BIN)/python benchmarks/endtoend.py --json benchmarks/results/endtoend.json
	$(BIN)/python benchmarks/growth.py --json benchmarks/results/growth.json
	$(BIN)/python benchmarks/model.py --json benchmarks/results/model.json

lint: env  ## ruff and mypy --strict
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: env  ## rewrite the generated reference pages
	$(BIN)/python -m jobs.docs

lock:  ## pin every dependency for Python 3.11 to 3.13 (needs uv)
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header \
	  --extra dev --extra evaluate --extra ladder --extra hub pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) demo build *.egg-info
