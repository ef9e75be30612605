# Both `make demo` and `make test` set everything up by themselves: Python 3.11+, git and make suffice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow check bench optimizers matrix faults mutants docs studies clean

demo: $(VENV)/installed
	$(BIN)/explaind demo $(ARGS)

test: check
	$(BIN)/python -m pytest --numprocesses auto $(ARGS)

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow --timeout 3600 $(ARGS)

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/stages.py --check

bench: $(VENV)/installed
	$(BIN)/python benchmarks/forward_mode.py
	$(BIN)/python benchmarks/recording.py

clean:
	rm -rf $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

optimizers: $(VENV)/installed
	PYTHONPATH=tools $(BIN)/python benchmarks/optimizers.py $(ARGS)

# The picture and the table in docs/architecture.md, from the imports.
docs: $(VENV)/installed
	$(BIN)/python tools/stages.py

# Every model x loop feature x optimizer, as a table.
matrix: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m support.loop_cells

# Random kills of recordings and attributions, histories under faults of every call, and random damage to stored files.
faults: $(VENV)/installed
	$(BIN)/python benchmarks/faults.py recording
	$(BIN)/python benchmarks/faults.py attribution
	$(BIN)/python benchmarks/faults.py histories 1000 0
	$(BIN)/python benchmarks/damage.py 1000 0

# Small changes of one module, one at a time, and which of them no test notices: make mutants ARGS="MODULE [TESTS ...]".
mutants: $(VENV)/mutation
	$(BIN)/python tools/mutants.py $(ARGS)

$(VENV)/mutation: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[mutation]'
	touch $@

# The paper's experiments at their full size; the pages under docs/studies are made so. Some four hours on two cores.
studies: $(VENV)/installed
	$(BIN)/explaind study table1 --keep docs/studies/table1
	$(BIN)/explaind study pruning --keep docs/studies/pruning
	$(BIN)/explaind study grokking --keep docs/studies/grokking
	$(BIN)/explaind study grokking --betas 0.98,0.99 --steps 2000 --parts influences,pipelines,swapping \
		--out runs/studies/grokking-0.98-0.99 --keep docs/studies/grokking-0.98-0.99
