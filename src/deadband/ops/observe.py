"""One pass of statistics over activations: a histogram of scores and the moments of each channel."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from deadband.ops import kernels
from deadband.ops.skipping import score

BINS = 1 << 15  # of the upper 16 bits of a float32 without the sign: 8 of exponent, 7 of mantissa
FIRST_NONFINITE = 0x7F80  # from here on: infinity, then NaN
Statistics: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def observe(x: Tensor, scale: Tensor | None = None) -> Statistics:
    """Statistics of `x` [rows, channels], a tensor of any floating-point dtype on any device.

    Returns:
        histogram: int64 [32768], counts of the upper 16 bits of the scores' float32 patterns (NaN and infinity last).
        rows: int64 [channels], the finite entries of x.
        sum, sum_of_squares: float64 [channels], of the finite entries of x.
    """
    if kernels.library is not None and x.device.type == "cpu" and x.dtype in kernels.DTYPES:
        return _observe_compiled(x.contiguous(), scale)
    return observe_reference(x, scale)


def observe_on_device(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`observe` as tensors on the device of `x`, in float64; nothing waits for it, and nothing is copied from there."""
    bits = score(x, scale).view(torch.int32).bitwise_and_(0x7FFFFFFF).reshape(-1) >> 16
    histogram = torch.zeros(BINS, dtype=torch.int64, device=x.device)
    histogram.index_add_(0, bits, torch.ones_like(bits, dtype=torch.int64))  # bincount looks for the largest first
    finite = x.isfinite()
    wide = torch.where(finite, x, 0).double()
    return histogram, finite.sum(0), wide.sum(0), wide.square().sum(0)


def observe_reference(x: Tensor, scale: Tensor | None = None) -> Statistics:
    """`observe` in plain torch."""
    bits = score(x, scale).view(torch.int32).bitwise_and_(0x7FFFFFFF) >> 16
    histogram = torch.bincount(bits.reshape(-1), minlength=BINS).cpu().numpy()
    wide = x.to(torch.float64) if x.device.type != "mps" else x.float()
    if histogram[FIRST_NONFINITE:].any():
        wide = torch.where(wide.isfinite(), wide, 0)
    total, squares = wide.sum(0).double().cpu().numpy(), wide.square().sum(0).double().cpu().numpy()
    return histogram, _finite_rows(x, histogram), total, squares


def _finite_rows(x: Tensor, histogram: np.ndarray) -> np.ndarray:
    if not histogram[FIRST_NONFINITE:].any():
        return np.full(x.shape[1], x.shape[0], np.int64)
    return x.isfinite().sum(0).cpu().numpy()


def _observe_compiled(x: Tensor, scale: Tensor | None) -> Statistics:
    rows, channels = x.shape
    histogram, total, squares = np.zeros(BINS, np.int64), np.zeros(channels), np.zeros(channels)
    assert kernels.library is not None
    error = kernels.library.deadband_observe(
        kernels.DTYPES[x.dtype],
        x.data_ptr(),
        rows,
        channels,
        channels,
        None if scale is None else scale.data_ptr(),
        histogram.ctypes.data,
        total.ctypes.data,
        squares.ctypes.data,
        torch.get_num_threads(),
    )
    if error:
        raise RuntimeError(f"deadband_observe returned {error} for {x.dtype} of shape {tuple(x.shape)}")
    return histogram, _finite_rows(x, histogram), total, squares
