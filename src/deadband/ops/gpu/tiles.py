"""How work is cut into programs on a GPU: by a table, `tiles.json`, that benchmarks/gpu_tiles.py measures."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of x, and of a weight that is not quantised: what the kernels take."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a launch is cut.

    Attributes:
        outputs: of a program; a multiple of 32, and a power of two, as all that follow.
        step: inputs whose weights a program loads at once.
        unroll: such loads that are under way at the same time.
        chunk: inputs whose kept ones are listed together; at least 128, the largest group that shares scales.
        warps: of a program.
        programs: for each processor of the GPU at least, as far as there are chunks to share out.
        compact: whether kept inputs are listed first; otherwise loads are predicated.
    """

    outputs: int = 128
    step: int = 8
    unroll: int = 8
    chunk: int = 512
    warps: int = 4
    programs: int = 4
    compact: bool = False

    def chunks(self, in_features: int, tiles: int, processors: int) -> int:
        """How many chunks of the inputs each program takes."""
        chunks = max(-(-in_features // self.chunk), 1)
        wanted = max(-(-self.programs * processors // max(tiles, 1)), 1)  # splits that fill the GPU
        return max(-(-chunks // wanted), 1)


DEFAULTS = {
    16: Tile(),  # 16 bytes for each thread and load
    8: Tile(outputs=256),
    4: Tile(outputs=256, step=16, unroll=4),
}
"""By bits of a weight, for what was not measured. Values of 32 bits count as 16."""
SEVERAL_ROWS = {
    16: Tile(step=16, unroll=4, warps=8),
    8: Tile(step=16, unroll=2, warps=8),
    4: Tile(step=16, unroll=2, warps=8),
}
"""The same from 3 rows on: their sums fill the registers."""


@functools.cache
def table() -> dict[str, list[dict[str, Any]]]:
    """What was measured, by architecture: entries with bits, rows, inputs, outputs and the settings of a tile."""
    return json.loads((importlib.resources.files(__package__) / "tiles.json").read_text())


@functools.lru_cache(maxsize=4096)
def tile_for(architecture: str, bits: int, rows: int, in_features: int, out_features: int) -> Tile:
    """The tile that was the fastest for the nearest shape on that architecture, such as sm_90; else a default.

    Example:
        >>> tile_for("sm_00", 4, 1, 4096, 4096)
        Tile(outputs=256, step=16, unroll=4, chunk=512, warps=4, programs=4, compact=False)
    """
    known = [each for each in table().get(architecture, ()) if each["bits"] == bits]
    if not known:
        return (DEFAULTS if rows <= 2 else SEVERAL_ROWS)[bits]

    def distance(entry: dict[str, Any]) -> float:
        own, other = (rows, in_features, out_features), (entry["rows"], entry["inputs"], entry["outputs"])
        return sum(abs(math.log(max(a, 1) / b)) for a, b in zip(own, other, strict=True))

    return Tile(**min(known, key=distance)["tile"])
