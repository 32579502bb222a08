"""Which tile is the fastest for each shape, format and number of rows: writes the table of this GPU's architecture.

    PYTHONPATH=src python benchmarks/gpu_tiles.py --out FOLDER

writes FOLDER/tiles.json: the table that the package has, with this architecture's entries taken anew. Copied to
src/deadband/ops/gpu/tiles.json, it is what kernels are launched by. About five minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from gpu import Run

from deadband.ops.gpu import launch
from deadband.ops.gpu.tiles import Tile, table
from deadband.quantization import WeightFormat

SHAPES = [(4096, 4096), (4096, 28672), (14336, 4096)]  # (in, out)
FORMATS = {16: None, 8: "int8", 4: "int4-g64-zp"}
SPARSITY = 0.5


def candidates(bits: int, rows: int) -> list[Tile]:
    """What is tried: loads of 16 bytes for each thread, in several forms."""
    found = []
    for outputs in {16: (64, 128, 256), 8: (128, 256), 4: (128, 256, 512)}[bits]:
        bytes_wide = outputs * bits // 8
        for warps in (4, 8):
            step = max(warps * 32 * 16 // bytes_wide, 1)
            if not 2 <= step <= 32:
                continue
            for unroll, chunk, compact in ((4, 512, False), (8, 512, False), (4, 512, True), (8, 1024, True)):
                unroll = max(unroll // (2 if rows > 2 else 1), 1)
                found.append(Tile(outputs, step, unroll, chunk, warps, 4, compact))
    return found


def fastest(run: Run, bits: int, rows: int, inputs: int, outputs: int) -> dict[str, Any]:
    """The entry of the table for a shape."""
    x = torch.randn(rows, inputs, device=run.device).to(torch.bfloat16)
    limit = x.float().abs().quantile(SPARSITY)
    rule = (None, limit, None, None, None)
    if bits == 16:
        stored = torch.randn(inputs, outputs, device=run.device).to(torch.bfloat16)
        pool, scales, minimum, group = run.pool(stored), None, None, 0
    else:
        format = WeightFormat.parse(FORMATS[bits])
        group = format.group_size or 0
        codes = torch.randint(0, 127, (inputs, outputs * bits // 8), device=run.device)
        pool = run.pool(codes.to(torch.int8 if bits == 8 else torch.uint8))
        scales = torch.rand(format.groups(inputs), outputs, device=run.device).to(format.scale_dtype)
        minimum = scales.clone() if format.zero_point else None

    def call() -> Any:
        stored = next(pool)
        return launch.linears(x, (stored.t() if bits == 16 else stored, scales, minimum, *rule), (group,), (False,), [])

    times = {}
    for tile in candidates(bits, rows):
        launch._tile = lambda layers, rows, in_features, tile=tile: tile
        try:
            times[tile] = run.seconds({"": call})[""]
        except Exception as error:  # a tile that does not fit into this GPU
            print(f"  {tile}: {type(error).__name__}")
    best = sorted(times, key=times.get)
    for tile in best[:3]:
        print(f"  {times[tile] * 1e6:7.1f} us {tile}", flush=True)
    return {"bits": bits, "rows": rows, "inputs": inputs, "outputs": outputs, "tile": dataclasses.asdict(best[0])}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--out", default="build/benchmarks/gpu", help="folder for tiles.json")
    made.add_argument("--minutes", type=float, default=5, help="after which no other shape is begun")
    options = made.parse_args()
    if not torch.cuda.is_available():
        made.error("torch sees no GPU")
    options.dry_run = False
    run, end = Run(options), time.monotonic() + 60 * options.minutes
    name, entries = launch._architecture(torch.device("cuda", 0)), []
    path = Path(options.out, "tiles.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    for rows in (1, 4):
        for bits in FORMATS:
            for inputs, outputs in SHAPES:
                if time.monotonic() > end:
                    continue
                print(f"{name}: {bits} bits, {rows} rows, {inputs} x {outputs}")
                with torch.inference_mode():
                    entries.append(fastest(run, bits, rows, inputs, outputs))
                path.write_text(json.dumps({**table(), name: entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
