"""The operators on GPUs: Triton kernels for a few rows of x, torch elsewhere.

kernels.py    the kernels
launch.py     what they take, scratch memory, grids
tiles.py      how work is cut, from tiles.json, by architecture
operators.py  when they serve, and the registrations
"""

from deadband.ops.gpu.operators import GpuWarning, usable
from deadband.ops.gpu.tiles import DTYPES

__all__ = ["DTYPES", "GpuWarning", "usable"]
