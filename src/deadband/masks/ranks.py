"""The ranks of distributed training put together what each of them aggregated, so that all make the same mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)
_MOST_DIMENSIONS = 12


def count() -> int:
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
    for rank in range(count()):
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


def on_all_ranks(value: bool, device: torch.device) -> bool:
    """Whether `value` is true on every rank."""
    flag = torch.tensor(int(value), device=_wire(device))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def broadcast_mask(mask: Any, device: torch.device) -> Any:
    """The mask of rank 0: a mask function may draw at random."""
    return _broadcast(mask, 0, device, 0)[0]


def _wire(device: torch.device) -> torch.device:
    """Where tensors have to be to travel: gloo takes those in main memory, NCCL those on the GPU."""
    if "nccl" not in dist.get_backend():
        return torch.device("cpu")
    return device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())


def _broadcast(value: Any, rows: int, device: torch.device, source: int) -> tuple[Any, int]:
    mine = dist.get_rank() == source
    tensors = ([] if value is None else value if isinstance(value, list) else [value]) if mine else []
    alike = len({(tensor.shape, tensor.dtype) for tensor in tensors}) == 1
    kind = -1 if value is None else int(isinstance(value, list))
    head = torch.tensor([kind, len(tensors), rows, alike], dtype=torch.int64, device=_wire(device))
    dist.broadcast(head, source)
    kind, tensors_sent, rows, alike = head.tolist()
    if alike:  # a thousand features travel as one
        together = torch.stack([tensor.detach() for tensor in tensors]) if mine else None
        received = list(_broadcast_tensor(together, device, source).unbind(0))
    else:
        received = [_broadcast_tensor(tensors[i] if mine else None, device, source) for i in range(tensors_sent)]
    return (None if kind < 0 else received if kind else received[0]), rows


def _broadcast_tensor(tensor: Tensor | None, device: torch.device, source: int) -> Tensor:
    device = device if tensor is None else tensor.device
    head = torch.zeros(_MOST_DIMENSIONS + 2, dtype=torch.int64)
    if tensor is not None:
        head[: tensor.dim() + 2] = torch.tensor([_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape])
    head = head.to(_wire(device))
    dist.broadcast(head, source)
    dtype, dimensions, *shape = head.tolist()
    if tensor is None:
        tensor = torch.empty(shape[:dimensions], dtype=_DTYPES[dtype])
    # as bytes, whatever the type; a copy, since what is received is written into it
    tensor = tensor.detach().to(_wire(device)).clone(memory_format=torch.contiguous_format)
    if tensor.numel():
        dist.broadcast(tensor.reshape(-1).view(torch.uint8), source)
    return tensor.to(device)
