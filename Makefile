# make demo   environment, then teacher, trajectories, both students and the report on the embedded digits
# make test   environment, then the tests
# make test-fast   the mathematics alone, in a minute
# make tables environment, then the tables of every embedded task: images, a graph, a text
# make gpu    environment, then speed and memory on a GPU, into results/speed-cuda.json
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast tables gpu lint clean

.venv/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: .venv/.ready
	$(BIN)/python train.py --task digits
	$(BIN)/python train.py --task digits --recipe paper

tables: .venv/.ready
	$(BIN)/python -m evidence.compare --task digits --seeds 0 --results runs/tables
	$(BIN)/python -m evidence.compare --task digits-graph --seeds 0 --results runs/tables
	$(BIN)/python -m evidence.compare --task docstrings --seeds 0 --results runs/tables

gpu: .venv/.ready
	$(BIN)/python -m evidence.speed --device cuda

test: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-fast: .venv/.ready
	$(BIN)/python -m pytest tests/test_anderson.py tests/test_fpode.py tests/test_student.py \
	    tests/test_losses.py tests/test_trajectories.py tests/test_mdeq.py tests/test_transformer.py \
	    tests/test_ignn.py

lint: .venv/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .ruff_cache
