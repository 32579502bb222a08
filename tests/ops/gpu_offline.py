"""Compile what the launches launch, for a GPU that is not here: `python gpu_offline.py cuda 90`, prints JSON.

Triton has its compilers for NVIDIA and AMD with it; only loading the result takes a GPU. In a process of its own, as
the interpreter is chosen when Triton is imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
import torch
import triton
from operators import random_operands, random_weight
from triton.backends.compiler import GPUTarget

from deadband.ops.gpu import launch
from deadband.ops.gpu.tiles import Tile

BACKEND, ARCHITECTURE = sys.argv[1], int(sys.argv[2]) if sys.argv[2].isdigit() else sys.argv[2]
RULE = (None, torch.tensor(0.5), None, None, None)


class Absent:
    """In the place of Triton's driver of a GPU."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget(BACKEND, ARCHITECTURE, 64 if BACKEND == "hip" else 32)


class Warmed:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel, compiled):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        return lambda *args, **settings: self.compiled.append(self.kernel.warmup(*args, grid=grid, **settings))


def resources(binary):
    """What cuobjdump says that a program takes: registers, and bytes of its own memory (what did not fit)."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, "kernel.cubin")).write_bytes(binary)
        said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def main():
    triton.runtime.driver.set_active(Absent())
    compiled = []
    for name in ("linears_kernel", "gate_and_up_kernel", "product_kernel"):
        setattr(launch.kernels, name, Warmed(getattr(launch.kernels, name), compiled))
    launch._processors = lambda device: 132
    launch._architecture = lambda device: f"sm_{ARCHITECTURE}" if BACKEND == "cuda" else ARCHITECTURE
    seen = {}

    def note(what):
        kernel = compiled[-1]
        text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
        wide = len(re.findall(r"ld\.global[.\w:]*\.v4\.b32|(?:global|buffer)_load_dwordx[24]", text))
        spilled = re.search(r"\.vgpr_spill_count: +(\d+)", text)
        own = resources(kernel.asm["cubin"]) if spilled is None else {"local": int(spilled[1])}
        seen[what] = {"wide": wide, **own}

    inputs, outputs = 4096, 4096
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.zeros(inputs, outputs, dtype=dtype).t()
        for rows in (1, 4, 8):
            x = torch.zeros(rows, inputs, dtype=dtype)
            counts = [torch.zeros(3, dtype=torch.int64)]
            launch.linears(x, (weight, None, None, *RULE), (0,), (False,), counts)
            note(f"{dtype} {rows}")
    x = torch.zeros(1, inputs, dtype=torch.bfloat16)
    _, bias, scale, center = random_operands(1, inputs, outputs, x.dtype, weighted=True, centered=True)
    for format in ("int8", "int4-g64-zp"):
        stored = random_weight(inputs, outputs, format)
        group = stored.format.group_size or 0
        parts = (stored.codes, stored.scales, stored.minimum, *RULE)
        for rows in (1, 4, 8):
            launch.linears(x.expand(rows, -1), parts, (group,), (True,), [])
            note(f"{format} {rows}")
        launch.quantized_product(x.expand(100, -1), *parts[:4], group)
        note(f"{format} product")
    every = (weight.to(x.dtype), None, None, bias, torch.tensor(0.5), scale, center, torch.zeros(outputs))
    launch.linears(x, (*every, *parts, *every), (0, group, 0), (True, False, True), [])
    note("three layers")
    launch.gated_mlp(x, every * 3, (0,) * 3, (False,) * 3, [], "silu")
    note("gated mlp")
    tile = Tile(compact=True)
    launch._tile = lambda layers, rows, in_features: tile
    launch.linears(x, every, (0,), (False,), [])
    note("compact")
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
