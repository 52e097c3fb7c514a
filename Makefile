# make train   set up .venv and run the main job on this machine
# make test    set up .venv if it is missing and run the tests
# make soak    disturb a run 20 times (SIGKILL, SIGTERM, full disk, one of two processes) and compare it with an undisturbed one
# Everything behind them is plain pip and python; the README has the same lines to type.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/first
STAMP := $(VENV)/.installed

.PHONY: train test soak lint clean

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[train,test]"
	touch $@

train: $(STAMP)
	$(BIN)/python vcd_fast/train.py --model wan --preset tiny --pictures examples/pictures --output $(RUN)

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: $(STAMP)
	$(BIN)/python tools/soak.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
