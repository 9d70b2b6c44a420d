# Two commands do everything, set-up included: `make demo` (the main job) and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := 2.13.0

.PHONY: demo test lint check-types pytest sanitize bench zoo zoo-peers observers accuracy weight-only conversion tracing-table recipe-table pictures plots clean

demo: $(VENV)/ready
	$(BIN)/python examples/digits.py

test: lint check-types pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check-types: $(VENV)/ready
	$(BIN)/mypy

# In the order of the folders: by default files with few tests go last, and those take longest (sanitizers, examples).
pytest: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

sanitize: $(VENV)/ready
	$(BIN)/python tests/kernels/sanitize.py

tracing-table: $(VENV)/ready
	$(BIN)/python docs/tracing_table.py

recipe-table: $(VENV)/ready
	$(BIN)/python docs/recipe_table.py

weight-only: $(VENV)/ready
	$(BIN)/python -m benchmarks.weight_only

conversion: $(VENV)/ready
	$(BIN)/python benchmarks/conversion.py

observers: $(VENV)/ready
	$(BIN)/python benchmarks/observers.py

accuracy: $(VENV)/ready-bench
	$(BIN)/python -m benchmarks.accuracy

bench: $(VENV)/ready-bench
	$(BIN)/python -m benchmarks.run

# torch first and by exact version: a range would fetch the newest release, with gigabytes of CUDA libraries.
$(VENV)/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch==$(TORCH)
	$(BIN)/python -m pip install -q -e ".[test]"
	touch $@

$(VENV)/ready-bench: $(VENV)/ready
	$(BIN)/python -m pip install -q -e ".[bench]"
	touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

zoo: $(VENV)/ready-bench
	$(BIN)/python -m benchmarks.zoo

zoo-peers: $(VENV)/ready-bench
	$(BIN)/python -m benchmarks.zoo_peers

pictures: $(VENV)/ready
	$(BIN)/python docs/pictures.py

plots: $(VENV)/ready-bench
	$(BIN)/python docs/numerics_pictures.py
