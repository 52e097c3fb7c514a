# make train   set up .venv and run the main job on this machine
# make test    set up .venv if it is missing and run the tests
# make soak    disturb a run 20 times (SIGKILL, SIGTERM, full disk, one of two processes) and compare it with an undisturbed one
# make study   tune the small model in every way the paper compares and judge what comes out (hours); docs/does-it-work.md
# make tiny-i2v   train that small model again, from nothing (hours)
# Everything behind them is plain pip and python; the README has the same lines to type.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/first
STAMP := $(VENV)/.installed

.PHONY: train test soak study tiny-i2v lint clean

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[train,test]"
	touch $@

train: $(STAMP)
	$(BIN)/python vcd_fast/train.py --model wan --preset tiny-i2v --pictures examples/tiny_i2v/pictures --output $(RUN)

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: $(STAMP)
	$(BIN)/python tools/soak.py

tiny-i2v: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e ".[examples]"
	$(BIN)/python -m examples.tiny_i2v.train_vae --output runs/tiny_i2v
	$(BIN)/python -m examples.tiny_i2v.train_transformer --output runs/tiny_i2v
	$(BIN)/python -m examples.tiny_i2v.build --output runs/tiny_i2v
	$(BIN)/python -m examples.tiny_i2v.check

study: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e ".[examples]"
	$(BIN)/python -m examples.tiny_i2v.study.run --output runs/study
	$(BIN)/python -m examples.tiny_i2v.study.run --output runs/study-1 --arms vcd --seeds 0 --guidance 1
	$(BIN)/python -m examples.tiny_i2v.study.run --output runs/study-8 --arms vcd --seeds 0 --guidance 8
	$(BIN)/python -m examples.tiny_i2v.study.parts --docs docs
	$(BIN)/python -m examples.tiny_i2v.study.report --output runs/study --docs docs --readme README.md --guidance 1=runs/study-1 8=runs/study-8

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
