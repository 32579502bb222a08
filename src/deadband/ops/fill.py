"""The entries of an input that a rule skips, filled, in one pass: by the kernel where it serves, else by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from deadband.ops import kernels
from deadband.ops.linear import count_
from deadband.ops.skipping import fill, keep_mask


def filled(
    x: Tensor, threshold: Tensor, scale: Tensor | None, center: Tensor | None, relative: bool, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`x` [..., in_features] with its skipped entries filled, and a bool mask of those that are kept; no gradients.

    The arguments are those of `deadband::sparse_linear`.
    """
    dtype = kernels.KERNEL_DTYPES.get(x.dtype)
    features = x.shape[-1]
    vectors = (scale, center)
    if (
        kernels.library is None
        or dtype is None
        or x.device.type != "cpu"
        or threshold.dtype is not torch.float32
        or any(
            each is not None
            and (each.dtype is not torch.float32 or each.numel() != features or not each.is_contiguous())
            for each in vectors
        )
    ):
        x = x.detach()
        keep = keep_mask(x, threshold, scale, center, relative)
        if counts is not None:
            count_(counts, x, keep)
        return fill(x, keep, center), keep
    x = x.detach().contiguous()
    y, keep = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    error = kernels.library.deadband_fill(
        dtype,
        x.data_ptr(),
        x.shape[:-1].numel(),
        features,
        features,
        threshold.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if center is None else center.data_ptr(),
        relative,
        y.data_ptr(),
        keep.data_ptr(),
        torch.get_num_threads(),
        None if counts is None else counts.data_ptr(),
    )
    if error:
        raise RuntimeError(f"kernel error {error} for x {tuple(x.shape)}, {x.dtype}")
    return y, keep
