# Two commands on a bare machine with python3 (venv, pip) and make: `make demo`, `make test`.
PY ?= python3
BIN := .venv/bin
UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export UV_FIND_LINKS
DEMO ?= results/demo

.PHONY: demo test test-cluster bench clean

.venv/.done: pyproject.toml constraints.txt
	$(PY) -m venv .venv
	$(BIN)/pip install -q uv
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.done ## one run, a small grid, the table and the report
	$(BIN)/python -m tasks fetch demo
	$(BIN)/python -m bench method=lora task=rte results=$(DEMO)/first
	$(BIN)/python -m bench experiment=demo results=$(DEMO)/grid
	$(BIN)/python -m analysis table $(DEMO)/grid
	$(BIN)/python -m analysis report $(DEMO)/grid -o $(DEMO)/report.html

test: .venv/.done ## the whole test suite, on the CPU and without a network
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

test-cluster: .venv/.done ## a real SLURM of one node, where its programs are: apt-get install slurm-wlm munge
	$(BIN)/python -m pytest -m cluster tests/test_cluster.py

bench: .venv/.done ## every benchmark in its quick form, its numbers against the goals
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv results
