"""A baseline for GPUs: skipping with split-k and atomic additions, as the published kernel of TEAL has it.

Each program multiplies a block of inputs by a block of outputs, with loads that are predicated by |x| > threshold, and
adds its sums to y with atomic additions. So y has to be cleared first, the order of additions is another one in each
run, and with it the result. (TEAL: Liu et al. 2024, arXiv 2408.14690.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_OUT, BLOCK_IN = 128, 64


@triton.jit
def _kernel(x, weight, y, threshold, inputs, outputs, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    entries = tl.load(x + column, column < inputs, other=0.0)
    kept = tl.abs(entries.to(tl.float32)) > tl.load(threshold)
    weights = tl.load(
        weight + column.to(tl.int64)[:, None] * outputs + out[None, :],
        kept[:, None] & (out < outputs)[None, :],
        other=0.0,
    )
    sums = tl.sum(entries.to(tl.float32)[:, None] * weights.to(tl.float32), 0)
    tl.atomic_add(y + out, sums.to(y.dtype.element_ty), out < outputs, sem="relaxed")


def atomics_linear(x: Tensor, weight: Tensor, threshold: Tensor) -> Tensor:
    """x [1, in] where |x| > threshold, times weight [in, out], contiguous; y [1, out] in the dtype of x."""
    inputs, outputs = weight.shape
    y = torch.zeros(1, outputs, dtype=x.dtype, device=x.device)
    grid = (-(-outputs // BLOCK_OUT), -(-inputs // BLOCK_IN))
    _kernel[grid](x, weight, y, threshold, inputs, outputs, BLOCK_OUT=BLOCK_OUT, BLOCK_IN=BLOCK_IN)
    return y
