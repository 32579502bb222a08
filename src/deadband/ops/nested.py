"""Nested tensors, which torch's TransformerEncoder makes of padded batches in evaluation, part by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------ nested tensors
#
# torch's TransformerEncoder makes them of padded batches in evaluation: parts that differ in length along one dimension
# or several. Few operators take them, so layers' inputs are looked at part by part.


def padded_shape(x: Tensor) -> torch.Size:
    """The shape of x; of a nested tensor, with the length of its longest part."""
    if not x.is_nested:
        return x.shape
    parts = x.unbind()
    return torch.Size([len(parts), *map(max, zip(*(part.shape for part in parts), strict=True))])


def padded(x: Tensor) -> Tensor:
    """x; of a nested tensor, its parts in one dense tensor, with zeros behind the shorter ones."""
    return torch.nested.to_padded_tensor(x, 0.0) if x.is_nested else x


def rows_of_parts(x: Tensor, dim: int = -1) -> Tensor:
    """x; of a nested tensor, what its parts hold, without padding: [rows, size along `dim`]."""
    if not x.is_nested:
        return x
    dim = dim if dim < 0 else dim - x.dim()
    if dim == -x.dim():
        raise IndexError("features along the first dimension of a nested tensor, which counts its parts")
    parts = [part.movedim(dim, -1) for part in x.unbind()]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def parts_of_rows(rows: Tensor, like: Tensor) -> Tensor:
    """What `rows_of_parts(like)` was turned into, in the shape of `like`."""
    if not like.is_nested:
        return rows
    pieces = iter(rows.split([part.numel() // part.shape[-1] for part in like.unbind()]))
    return map_nested(like, lambda _, part: next(pieces).reshape(part.shape))


def map_nested(x: Tensor, function: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The nested tensor of what `function` makes of each part, given its number, without changing its length."""
    parts = [function(number, part) for number, part in enumerate(x.unbind())]
    return jagged(torch.cat(parts, ragged(x) - 1), x) if ragged(x) else torch.nested.as_nested_tensor(parts)


def ragged(x: Any) -> int:
    """The dimension along which the parts of a tensor of torch.jagged differ; 0 for other layouts."""
    return x._ragged_idx if x.layout is torch.jagged else 0


def jagged(values: Tensor, like: Any) -> Tensor:
    """Values of parts one after the other as a tensor of torch.jagged with the parts of another."""
    # with the same offsets, without which it could not be added to `like`
    return torch.nested.nested_tensor_from_jagged(values, like.offsets(), jagged_dim=ragged(like))
