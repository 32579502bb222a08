#!/usr/bin/env bash
# triton 3.7.1 (3.6.0 does the same), compiling for NVIDIA sm_90, which takes no GPU; seen 2026-11-28.
#
# Guess: inside a kernel, `layer = layers[0]` gives an element of a tuple argument another name, so that what is known at
#        compile time in it (a tl.constexpr member of a NamedTuple) still is under that name.
# Seen:  layers[0].bits is the number 4; layer.bits is a runtime value, int32[]. So `if layer.bits == 4:` no longer
#        chooses a branch at compile time, and a function that returns other shapes for other formats does not compile.
# Where it hurts: kernels over several layers of unlike formats. Pass layers[0] on as it is.
#
# Installs pinned packages into a temporary folder. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet triton==3.7.1 2>/dev/null
export TRITON_CACHE_DIR="$folder/cache"
cat >"$folder/kernels.py" <<'PYTHON'
from typing import Any, NamedTuple

import triton
import triton.language as tl


class Layer(NamedTuple):
    weight: Any
    bits: Any


@triton.jit
def width(layer):
    tl.static_print("bits inside:", layer.bits)
    if layer.bits == 4:
        return tl.arange(0, 8)
    else:
        return tl.arange(0, 4)


@triton.jit
def passed_on(layers):
    tl.store(layers[0].weight + width(layers[0]), 1.0)


@triton.jit
def under_a_name(layers):
    layer = layers[0]
    tl.store(layer.weight + width(layer), 1.0)
PYTHON
cat >"$folder/run.py" <<'PYTHON'
import kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compiles(kernel):
    signature = {"layers": (kernels.Layer("*fp32", "constexpr"),)}
    source = ASTSource(kernel, signature, constexprs={(0, 0, 1): 4})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    except triton.CompilationError as error:
        while error.__cause__ is not None:
            error = error.__cause__
        return str(error).strip().splitlines()[-1]
    return "compiles"


found = compiles(kernels.passed_on), compiles(kernels.under_a_name)
print("triton", triton.__version__, "passed on:", found[0], "- under a name:", found[1])
assert found[0] == "compiles" and "Return type mismatch" in found[1], "the behaviour has changed"
PYTHON
cd "$folder" && "$folder/venv/bin/python" run.py
