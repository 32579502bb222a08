"""Ready-made mask functions for ActivationSparsifier: scores become a bool mask, True = keep.

Each takes the reduced data of any shape and returns a mask of the same shape; scores are magnitudes. Where a number of
entries is asked for, exactly so many are masked: between equal scores the ones that come first are kept. NaN counts as
larger than any number, so that nothing is dropped for being unknown. Their other arguments come from the keywords
of the sparsifier's constructor or of `register_layer`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def magnitude(data: Tensor, sparsity: float) -> Tensor:
    """Mask the fraction `sparsity` of the entries that has the least magnitudes.

    Example:
        >>> magnitude(torch.tensor([0.1, -3.0, 0.2, 2.0]), sparsity=0.5)
        tensor([False,  True, False,  True])
    """
    return _keep_largest(_scores(data), data.numel() - _count(sparsity, data.numel()))


def threshold(data: Tensor, threshold: float) -> Tensor:
    """Keep the entries whose magnitude is above `threshold`.

    Example:
        >>> threshold(torch.tensor([0.1, -3.0]), threshold=1.0)
        tensor([False,  True])
    """
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold!r}; expected a number that is not negative")
    return ~(data.abs() <= threshold)


def top_k(data: Tensor, k: int) -> Tensor:
    """Keep the `k` entries with the largest magnitudes (all, if there are fewer).

    Example:
        >>> top_k(torch.tensor([0.1, -3.0, 2.0]), k=1)
        tensor([False,  True, False])
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 0:
        raise ValueError(f"k={k!r}; expected a whole number that is not negative")
    return _keep_largest(_scores(data), k)


def n_m(data: Tensor, n: int = 2, m: int = 4, dim: int = -1) -> Tensor:
    """Keep the `n` largest of every `m` neighbours along `dim`: 2:4 by default. A shorter rest keeps its share.

    Example:
        >>> n_m(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 1.0, 2.0]))
        tensor([ True,  True, False, False, False, False,  True,  True])

    Source: Mishra et al. 2021, arXiv 2104.08378.
    """
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"n={n!r}, m={m!r}; expected 0 <= n <= m and m >= 1")
    if not data.numel():
        return torch.ones_like(data, dtype=torch.bool)
    scores = _scores(data).movedim(dim, -1)
    length = scores.shape[-1]
    whole = length - length % m
    groups = scores[..., :whole].reshape(*scores.shape[:-1], -1, m)
    keep = [keep_largest(groups, n).flatten(-2)] if whole else []
    if whole < length:
        keep.append(keep_largest(scores[..., whole:], math.ceil((length - whole) * n / m)))
    return torch.cat(keep, -1).movedim(-1, dim)


def block(data: Tensor, sparsity: float, size: int = 16, dim: int = -1) -> Tensor:
    """Mask whole blocks of `size` neighbours along `dim`: the fraction `sparsity` of blocks of least mean magnitude.

    Example:
        >>> block(torch.tensor([1.0, 9.0, 4.0, 4.0]), sparsity=0.5, size=2)
        tensor([ True,  True, False, False])
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size={size!r}; expected a whole number of at least 1")
    if not data.numel():
        return torch.ones_like(data, dtype=torch.bool)
    scores = _scores(data).movedim(dim, -1)
    parts = scores.split(size, -1)
    means = torch.stack([part.mean(-1) for part in parts], -1)
    means = torch.where(means.isnan(), math.inf, means)
    keep = _keep_largest(means, means.numel() - _count(sparsity, means.numel()))
    return keep.repeat_interleave(size, -1)[..., : scores.shape[-1]].movedim(-1, dim)


def random(data: Tensor, sparsity: float, seed: int = 0) -> Tensor:
    """Mask a random fraction `sparsity` of the entries, the same for the same `seed`: a baseline.

    Example:
        >>> int(random(torch.zeros(10), sparsity=0.3).sum())
        7
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(data.numel(), generator=generator)
    keep = torch.ones(data.numel(), dtype=torch.bool)
    keep[order[: _count(sparsity, data.numel())]] = False
    return keep.reshape(data.shape).to(data.device)


def _count(sparsity: float, entries: int) -> int:
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity!r}; expected a fraction from 0 to 1")
    return round(sparsity * entries)


def _scores(data: Tensor) -> Tensor:
    scores = data.abs()
    scores = scores if scores.is_floating_point() else scores.double()
    return torch.where(scores.isnan(), math.inf, scores)


def _keep_largest(scores: Tensor, count: int) -> Tensor:
    return keep_largest(scores.reshape(-1), count).reshape(scores.shape)


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Keep the `count` largest along the last dimension; between equal ones those that come first.

    Example:
        >>> keep_largest(torch.tensor([[2.0, 1.0, 2.0], [3.0, 3.0, 3.0]]), 2)
        tensor([[ True, False,  True],
                [ True,  True, False]])

    Args:
        scores: [..., n] without NaN.
        count: how many; all if there are fewer.

    Returns:
        bool, of the same shape.
    """
    size = scores.shape[-1]
    if count <= 0 or count >= size:
        return torch.full(scores.shape, count > 0, dtype=torch.bool, device=scores.device)
    if size <= _FEW:
        return _among_few(scores, count)
    scores = scores.float() if scores.itemsize < 4 else scores
    last = _smallest(scores, size - count + 1)
    keep = scores >= last
    surplus = keep.sum(-1, keepdim=True) - count
    if not scores.is_meta and not surplus.any():
        return keep
    equal = scores == last
    return keep & ~(equal & (equal.cumsum(-1) > equal.sum(-1, keepdim=True) - surplus))


_FEW, _MANY = 16, 2**14


def _among_few(scores: Tensor, count: int) -> Tensor:
    """`keep_largest` by comparing all pairs: faster than sorting where rows are short."""
    columns = scores.unbind(-1)
    ranks = [torch.zeros(scores.shape[:-1], dtype=torch.uint8, device=scores.device) for _ in columns]
    for later in range(len(columns)):
        for earlier in range(later):
            before = columns[earlier] >= columns[later]
            ranks[later] += before
            ranks[earlier] += ~before
    return torch.stack([rank < count for rank in ranks], -1)


def _smallest(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest of each row, [..., 1]: of a long one, among those that share its leading 16 bits."""
    size = scores.shape[-1]
    if scores.numel() != size or size < _MANY or scores.dtype != torch.float32 or scores.is_meta:
        return scores.kthvalue(k, dim=-1, keepdim=True).values
    bits = scores.reshape(-1).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> 16  # as whole numbers in the order of the floats
    below = torch.bincount(ordered + 2**15, minlength=2**16).cumsum(0)
    leading = int(torch.searchsorted(below, k))
    rest = k - (int(below[leading - 1]) if leading else 0)
    same = scores.reshape(-1)[ordered == leading - 2**15]
    return same.kthvalue(rest).values.expand(*scores.shape[:-1], 1)
