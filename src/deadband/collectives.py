"""The ranks of distributed training put together what each of them aggregated, so that all make the same mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
_MOST_DIMENSIONS = 12


def ranks() -> int:
    """How many processes train together; 1 outside of torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def merge_over_ranks(
    data: Any, rows: int, device: torch.device, merge: Callable[[Tensor, int, Tensor, int], Tensor]
) -> tuple[Any, int]:
    """What all ranks aggregated for one layer, and for how many rows; the same, bit for bit, on every rank.

    Args:
        data: a tensor, a list of tensors, or None on a rank that the layer's input never reached.
        rows: what `data` stands for.
        device: where tensors are received on a rank without data.
        merge: puts (data, rows) of two ranks together; called in the order of ranks.
    """
    result, total = None, 0
    for rank in range(ranks()):
        other, other_rows = _broadcast(data, rows, device, rank)
        if other is None:
            continue
        if result is None:
            result = other
        elif isinstance(result, list):
            pairs = zip(result, other, strict=True)
            result = [merge(mine, total, theirs, other_rows) for mine, theirs in pairs]
        else:
            result = merge(result, total, other, other_rows)
        total += other_rows
    return result, total


def broadcast_mask(mask: Any, device: torch.device) -> Any:
    """The mask of rank 0: a mask function may draw at random."""
    return _broadcast(mask, 0, device, 0)[0]


def _broadcast(value: Any, rows: int, device: torch.device, source: int) -> tuple[Any, int]:
    mine = dist.get_rank() == source
    tensors = ([] if value is None else value if isinstance(value, list) else [value]) if mine else []
    device = tensors[0].device if tensors else device
    kind = -1 if value is None else int(isinstance(value, list))
    head = torch.tensor([kind, len(tensors), rows], dtype=torch.int64, device=device)
    dist.broadcast(head, source)
    kind, count, rows = head.tolist()
    received = [_broadcast_tensor(tensors[i] if mine else None, device, source) for i in range(count)]
    return (None if kind < 0 else received if kind else received[0]), rows


def _broadcast_tensor(tensor: Tensor | None, device: torch.device, source: int) -> Tensor:
    head = torch.zeros(_MOST_DIMENSIONS + 2, dtype=torch.int64, device=device)
    if tensor is not None:
        head[: tensor.dim() + 2] = torch.tensor([_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape])
    dist.broadcast(head, source)
    dtype, dimensions, *shape = head.tolist()
    if tensor is None:
        tensor = torch.empty(shape[:dimensions], dtype=_DTYPES[dtype], device=device)
    tensor = tensor.contiguous()
    dist.broadcast(tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor, source)
    return tensor
