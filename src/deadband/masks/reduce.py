"""Ready-made reduce functions for ActivationSparsifier: what was aggregated becomes one number for each feature.

What `deadband.aggregate` keeps is one number for each feature already: a vector passes through `mean` and `quantile` as
it is. Data with more dimensions (from an aggregate function of your own) are reduced over all dimensions but `dim`,
which stay with size 1, so that a mask made from the result broadcasts to the input. For another `dim`,
`functools.partial(reduce.mean, dim=1)`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _others(data: Tensor, dim: int) -> list[int]:
    if not -data.dim() <= dim < max(data.dim(), 1):
        raise ValueError(f"dim={dim} is out of range for data of shape {tuple(data.shape)}")
    return [each for each in range(data.dim()) if each != dim % data.dim()] if data.dim() else []


def _wide(data: Tensor) -> Tensor:
    return data if data.dtype in (torch.float32, torch.float64) else data.float()


def mean(data: Tensor, dim: int = -1) -> Tensor:
    """The mean over every dimension but `dim`.

    Example:
        >>> mean(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[2., 3.]])
    """
    others = _others(data, dim)
    return _wide(data).mean(others, keepdim=True) if others else data


def l2_norm(data: Tensor, dim: int = -1) -> Tensor:
    """The Euclidean norm over every dimension but `dim`; of a vector, the magnitudes.

    Example:
        >>> l2_norm(torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
        tensor([[5., 1.]])
    """
    others = _others(data, dim)
    return torch.linalg.vector_norm(_wide(data), 2, others, keepdim=True) if others else data.abs()


def quantile(data: Tensor, q: float = 0.5, dim: int = -1) -> Tensor:
    """The `q` quantile (0.5: the median) over every dimension but `dim`, between entries by linear interpolation.

    Example:
        >>> quantile(torch.tensor([[1.0, 5.0], [2.0, 6.0], [9.0, 7.0]]))
        tensor([[2., 6.]])
    """
    if not 0 <= q <= 1:
        raise ValueError(f"q={q!r}; expected a number from 0 to 1")
    others = _others(data, dim)
    if not others:
        return data
    dim %= data.dim()
    rows = (
        _wide(data).movedim(dim, -1).reshape(-1, data.shape[dim]).sort(0).values
    )  # torch.quantile: 2**24 entries at most
    position = q * (len(rows) - 1)
    low = int(position)
    result = torch.lerp(rows[low], rows[min(low + 1, len(rows) - 1)], position - low)
    result = torch.where(rows[-1].isnan(), rows[-1], result)  # sort puts NaN last
    return result.reshape([-1 if each == dim else 1 for each in range(data.dim())])
