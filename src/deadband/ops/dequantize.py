"""A quantised weight as numbers, the way its codes lie: by the kernel where it serves, else by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from deadband.ops import kernels
from deadband.ops.linear import dequantize


def by_input(codes: Tensor, scales: Tensor, minimum: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    """What `deadband.ops.linear.dequantize` gives, transposed: [in_features, out_features]."""
    code = kernels.KERNEL_DTYPES.get(dtype)
    outputs = scales.shape[1]
    plain = kernels.readable(codes) and not torch.compiler.is_compiling()
    parts = [each for each in (codes, scales, minimum) if each is not None]
    contiguous = all(each.device.type == "cpu" and each.is_contiguous() for each in parts)
    if kernels.library is None or code is None or not plain or not contiguous:
        return dequantize(codes, scales, minimum, group_size, dtype).t().contiguous()
    y = torch.empty(codes.shape[0], outputs, dtype=dtype)
    error = kernels.library.deadband_dequantize(
        code,
        8 if codes.dtype is torch.int8 else 4,
        codes.data_ptr(),
        scales.data_ptr(),
        None if minimum is None else minimum.data_ptr(),
        group_size,
        codes.shape[0],
        outputs,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if error:
        raise RuntimeError(f"kernel error {error} for codes {tuple(codes.shape)} {codes.dtype}")
    return y
