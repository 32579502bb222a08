"""deadband::sparse_linear on CPUs, float32 and bfloat16: the compiled kernels where they serve, torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deadband.criterion import keep_mask
from deadband.ops import kernels

KERNEL_ROWS = 4  # what the kernels that stream the weight take at most
INPUT_MAJOR, OUTPUT_MAJOR = 0, 1  # [in, out] as SparseLinear lays it out; [out, in] as torch does

# Rows up to which the kernels' product on a [in, out] weight beats torch's, which repacks such a weight on each call.
_OWN_ROWS = {torch.float32: 128, torch.bfloat16: 128}

_get_num_threads = torch.get_num_threads


def register(library: torch.library.Library) -> None:
    """Add the CPU kernels to the operator; without them the torch reference stays in place."""
    if kernels.library is not None:
        library.impl("sparse_linear", sparse_linear, "CPU")


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    scale: Tensor | None,
    sparse_rows: int,
    counts: Tensor | None,
) -> Tensor:
    """The operator on CPU tensors; its arguments are explained in `deadband.ops`."""
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise RuntimeError(
            f"sparse_linear: x has {x.shape[-1]} features, the weight of shape {tuple(weight.shape)} expects {in_features}"
        )
    rows = x.numel() // in_features if in_features else x.shape[:-1].numel()
    dtype = kernels.DTYPES.get(x.dtype, 2)
    layout = _layout(weight)
    if dtype == 2 or layout is None or x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        from deadband.ops import sparse_linear_reference

        return sparse_linear_reference(x, weight, bias, threshold, scale, sparse_rows, counts)
    assert kernels.library is not None
    if not x.is_contiguous():
        x = x.contiguous()
    skips = rows <= sparse_rows
    if skips and (rows > KERNEL_ROWS or layout == OUTPUT_MAJOR):
        keep = keep_mask(x, threshold, scale)
        if counts is not None:
            counts += torch.stack([(~keep).sum(), torch.tensor(x.numel())])
        x, skips = torch.where(keep, x, 0), False
    if rows > (_OWN_ROWS[x.dtype] if layout == INPUT_MAJOR else KERNEL_ROWS):
        return F.linear(x, weight, bias)
    y = x.new_empty((*x.shape[:-1], out_features))
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if skips:
        error = kernels.library.deadband_sparse_linear(
            dtype,
            x.data_ptr(),
            rows,
            in_features,
            in_features,
            weight.data_ptr(),
            weight.stride(1),
            out_features,
            None if bias is None else bias.data_ptr(),
            threshold.data_ptr(),
            None if scale is None else scale.data_ptr(),
            y.data_ptr(),
            _get_num_threads(),
            None if counts is None else counts.data_ptr(),
        )
    else:
        error = kernels.library.deadband_dense_linear(
            dtype,
            layout,
            x.data_ptr(),
            rows,
            in_features,
            in_features,
            weight.data_ptr(),
            weight.stride(1 - layout),
            out_features,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            _get_num_threads(),
        )
    if error:
        raise RuntimeError(f"the kernel returned {error} for x {tuple(x.shape)} and weight {tuple(weight.shape)}, {x.dtype}")
    return y


def _layout(weight: Tensor) -> int | None:
    out_stride, in_stride = weight.stride()
    out_features, in_features = weight.shape
    if out_stride == 1 and in_stride >= out_features:
        return INPUT_MAJOR
    if in_stride == 1 and out_stride >= in_features:
        return OUTPUT_MAJOR
    return None
