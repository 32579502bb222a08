"""Masks of weights by blocks: the blocks of least score are dropped, or the entries of least score within blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deadband.compaction.resize import conv1d_class
from deadband.masks.mask import keep_largest

SCOPES = ("tensor", "row", "global")
"""Within what blocks are compared."""


def is_transposed(module: nn.Module | None) -> bool:
    """Whether a module is transformers' Conv1D, whose weight is [in, out]."""
    kind = conv1d_class()
    return kind is not None and isinstance(module, kind)


def matrix_of(tensor: Tensor, module: nn.Module | None = None) -> Tensor:
    """A weight as a matrix [outputs, inputs]: kernels position by position, so that neighbours are input channels.

    Example:
        >>> matrix_of(torch.zeros(8, 3, 5, 5)).shape, matrix_of(torch.zeros(8)).shape
        (torch.Size([8, 75]), torch.Size([1, 8]))
    """
    if tensor.dim() < 2:
        return tensor.reshape(1, -1)
    if tensor.dim() == 2:
        return tensor.T if is_transposed(module) else tensor
    return tensor.movedim(1, -1).flatten(1)


def in_shape_of(matrix: Tensor, tensor: Tensor, module: nn.Module | None = None) -> Tensor:
    """The reverse of `matrix_of`: a matrix in the shape of a tensor, contiguous."""
    shape = tensor.shape
    if tensor.dim() > 2:
        return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()
    return matrix.T.contiguous() if is_transposed(module) else matrix.reshape(shape)


def check_level(name: str, level: object) -> None:
    """A ValueError that names the tensor if its level is no number."""
    if not isinstance(level, (int, float)) or isinstance(level, bool) or math.isnan(level):
        raise ValueError(f"{name}: sparsity_level={level!r}; expected a number, in defaults or config")


def check_blocks(name: str, level: object, block: Sequence[int], zeros_per_block: int, scope: str = "tensor") -> None:
    """A ValueError that names the tensor if its configuration cannot be."""
    check_level(name, level)
    whole = [type(size) is int and size > 0 for size in block] if isinstance(block, Sequence) else []
    if whole != [True, True]:
        raise ValueError(f"{name}: sparse_block_shape={block!r}; expected (rows, columns), both at least 1")
    if type(zeros_per_block) is not int or not 0 <= zeros_per_block <= math.prod(block):
        raise ValueError(
            f"{name}: zeros_per_block={zeros_per_block!r}; expected a whole number from 0 to the {math.prod(block)} "
            f"entries of a block of {tuple(block)}"
        )
    if scope not in SCOPES:
        raise ValueError(f"{name}: scope={scope!r}; expected one of {', '.join(SCOPES)}")


_FEW = 16  # entries of a block, up to which they are added one place after the other


def block_scores(scores: Tensor, block: Sequence[int]) -> Tensor:
    """The mean of each block's scores [rows, columns], of what is inside the matrix at its edges; NaN is infinite."""
    (height, width), (tall, wide) = scores.shape, block
    if height % tall or width % wide or tall * wide > _FEW:
        scores = F.avg_pool2d(scores[None, None], (tall, wide), (tall, wide), ceil_mode=True)[0, 0]
    elif tall * wide > 1:  # the same sums in the same order, many at once
        entries = scores.unflatten(1, (-1, wide)).unflatten(0, (-1, tall))
        places = [entries[:, row, :, column] for row in range(tall) for column in range(wide)]
        total = places[0] + places[1]
        for place in places[2:]:
            total += place
        scores = total.div_(tall * wide)
    return infinite_if_nan(scores)


def infinite_if_nan(scores: Tensor) -> Tensor:
    """Scores with infinity for NaN: what is not known is not dropped."""
    return scores.nan_to_num(math.inf, math.inf) if scores.is_meta or scores.sum().isnan() else scores


def count_of(level: float, blocks: int, *, all_may_go: bool = False) -> int:
    """How many of so many blocks a level drops: the nearest count, but unless `all_may_go` not all below 1."""
    if level >= 1:
        return blocks
    return min(max(round(level * blocks), 0), blocks if all_may_go else blocks - 1)


def kept_blocks(
    scores: Tensor,
    level: float,
    *,
    scope: str = "tensor",
    all_may_go: bool = False,
    sizes: Tensor | None = None,
    last_first: bool = True,
) -> Tensor:
    """Which blocks stay, by their scores [down, across].

    Args:
        scores: of blocks.
        level: the share that is dropped.
        scope: "row" compares within rows of blocks.
        all_may_go: see `count_of`.
        sizes: entries of each block; with them `level` is of entries, and the count that comes nearest is dropped.
        last_first: of equal blocks the last go first; else the first.

    Returns:
        bool [down, across].
    """
    rows = scores if scope == "row" else scores.reshape(1, -1)
    rows = rows if last_first else rows.flip(-1)
    count = count_of(level, rows.shape[1], all_may_go=all_may_go)
    if sizes is not None:
        order = rows[0].flip(0).argsort(stable=True)
        dropped = sizes.reshape(-1).to(order.device).flip(0)[order].cumsum(0)
        count = int((F.pad(dropped, (1, 0)) - level * int(sizes.sum())).abs().argmin())
    kept = keep_largest(rows, rows.shape[1] - count)
    return (kept if last_first else kept.flip(-1)).view(scores.shape)


def block_sizes(shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """How many entries of a matrix each block holds: fewer at the edges.

    Example:
        >>> block_sizes((2, 6), (1, 4))
        tensor([[4, 2],
                [4, 2]])
    """
    sides = [
        (length - torch.arange(0, length, side)).clamp_max(side) for length, side in zip(shape, block, strict=True)
    ]
    return torch.outer(*sides)


def block_mask(scores: Tensor, kept: Tensor, block: Sequence[int], zeros_per_block: int) -> Tensor:
    """The mask of a matrix: in blocks that are not kept, the entries of least score are dropped.

    Args:
        scores: of entries, [rows, columns].
        kept: bool, of blocks.
        block: (rows, columns) of a block.
        zeros_per_block: how many entries of a block go.

    Returns:
        bool [rows, columns], True = keep.
    """
    (height, width), (tall, wide), (down, across) = scores.shape, block, kept.shape
    spread = kept[:, None, :, None].expand(down, tall, across, wide)
    if zeros_per_block == tall * wide:
        return spread.reshape(down * tall, across * wide)[:height, :width]
    scores = infinite_if_nan(scores)
    if height % tall or width % wide:
        scores = F.pad(scores, (0, across * wide - width, 0, down * tall - height), value=math.inf)
    entries = scores.view(down, tall, across, wide).transpose(1, 2).reshape(down, across, -1)
    inner = keep_largest(entries, tall * wide - zeros_per_block).view(down, across, tall, wide).transpose(1, 2)
    inner = inner | spread if kept.is_meta or kept.any() else inner
    return inner.reshape(down * tall, across * wide)[:height, :width]
