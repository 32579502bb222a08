#!/usr/bin/env bash
# torch 2.13.0: torch._inductor.standalone_compile(graph, inputs, dynamic_shapes="from_graph") takes two sizes that are
# dynamic and independent (two symbols in the exported program) for one, if they are equal in the example. The exported
# program itself, called with other sizes, is right; the compiled function is wrong and raises nothing.
#
# Seen (torch 2.13.0+cpu, Python 3.11, Linux x86-64), for the sum of 3 ones plus the length of a second tensor, 5:
#   exported program: 8.0; compiled with examples of 3 and 3: 6.0; compiled with examples of 3 and 4: 8.0
# Exits 0 if it is still so, 1 if not.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" "numpy==2.3.5"
export TORCHINDUCTOR_CACHE_DIR="$folder/cache"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torch._inductor


class Total(torch.nn.Module):
    def forward(self, x, y):
        return x.sum() + y.shape[0]


def compiled(second):
    """The exported program and what inductor makes of it, of examples of 3 and `second` entries."""
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        Total(), (torch.ones(3), torch.ones(second)), dynamic_shapes=({0: dynamic}, {0: dynamic})
    )
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    assert inputs[0].shape[0] is not inputs[1].shape[0] and len(program.range_constraints) == 2, "one symbol"
    return program, torch._inductor.standalone_compile(program.graph_module, inputs, dynamic_shapes="from_graph")


sizes = torch.ones(3), torch.ones(5)
program, equal = compiled(3)
_, other = compiled(4)
found = float(program.module()(*sizes)), float(equal(*sizes)[0]), float(other(*sizes)[0])
print(f"torch {torch.__version__}: exported program {found[0]}, examples of 3 and 3: {found[1]}, of 3 and 4: {found[2]}")
sys.exit(0 if found == (8.0, 6.0, 8.0) else 1)
PYTHON
