"""How an entry of a site's input is scored. An entry is kept unless its score is at or below the threshold.

    magnitude            |x_i|                  TEAL (Liu et al. 2024, arXiv 2408.14690)
    weighted_magnitude   |x_i| * ||W[:, i]||    WINA (Chen et al. 2025, arXiv 2505.19427)

Both are `|x_i| * scale_i` with `scale` either nothing or the column norms of the weight, which is all that the rest of
the library knows of a criterion. Scores are float32 whatever the dtype of x. A NaN score is kept: what is broken in
the dense model has to surface in the sparse one too.
"""

from __future__ import annotations

import torch
from torch import Tensor

CRITERIA = ("magnitude", "weighted_magnitude")


def check_criterion(criterion: str) -> str:
    """Return `criterion`, or raise a ValueError that lists the known ones."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r} is not known; expected one of {', '.join(map(repr, CRITERIA))}")
    return criterion


def scale_of(criterion: str, matrix: Tensor) -> Tensor | None:
    """What |x| is multiplied by under `criterion`, for a weight of shape [out_features, in_features].

    Returns None for `magnitude` and the float32 column norms, [in_features], for `weighted_magnitude`.
    """
    if check_criterion(criterion) == "magnitude":
        return None
    wide = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(matrix.detach(), dim=0, dtype=wide).float()


def score(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Float32 scores of the entries of `x` [..., in_features].

    Example:
        >>> score(torch.tensor([-2.0, 1.0]), scale=torch.tensor([1.0, 3.0]))
        tensor([2., 3.])
    """
    magnitude = x.abs().float()
    return magnitude if scale is None else magnitude * scale


def keep_mask(x: Tensor, threshold: Tensor | float, scale: Tensor | None = None) -> Tensor:
    """Bool mask of the entries of `x` that are kept: score > threshold, or NaN.

    Example:
        >>> keep_mask(torch.tensor([0.5, -2.0, float("nan")]), 0.5)
        tensor([False,  True,  True])
    """
    return ~(score(x, scale) <= threshold)
