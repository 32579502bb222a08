"""How an entry of a site's input is scored. An entry is kept unless its score is at or below the threshold.

    magnitude            |x_i|                  TEAL (Liu et al. 2024, arXiv 2408.14690)
    weighted_magnitude   |x_i| * ||W[:, i]||    WINA (Chen et al. 2025, arXiv 2505.19427)
    sensitivity          |x_i| * rms(dL/dx_i)   the loss's gradient over calibration data, see allocation/sensitivity.py

All are `|x_i| * scale_i`, which is all that the rest of the library knows of a criterion. Scores are float32 whatever
the dtype of x. A NaN score is kept: what is broken in the dense model has to surface in the sparse one too.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from deadband.ops.skipping import fill, keep_mask, norm_of

CRITERIA = ("magnitude", "weighted_magnitude", "sensitivity")
LARGEST = torch.finfo(torch.float32).max
"""The largest threshold: they are float32."""


def check_criterion(criterion: str) -> str:
    """Return `criterion`, or raise a ValueError that lists the known ones."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r} is not known; expected one of {', '.join(map(repr, CRITERIA))}")
    return criterion


def scale_of(criterion: str, matrix: Tensor) -> Tensor | None:
    """What |x| is multiplied by under `criterion`, for a weight of shape [out_features, in_features].

    Of experts, [experts, out_features, in_features], the root mean square of theirs: they have one rule.

    Returns None for `magnitude` and the float32 column norms, [in_features], for `weighted_magnitude`.

    Raises:
        ValueError: an unknown criterion, or `sensitivity`, whose scale a weight does not tell.
    """
    if check_criterion(criterion) == "magnitude":
        return None
    if criterion == "sensitivity":
        raise ValueError(
            "criterion 'sensitivity' takes backward passes through the model, which "
            "Calibration.allocate(sparsity, 'sensitivity', model=model, batches=batches) runs"
        )
    wide = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(matrix.detach(), dim=-2, dtype=wide)
    return (norms if norms.dim() == 1 else norms.square().mean(0).sqrt()).float()


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """What one site skips: an entry is kept if and only if `|x_i - center_i| * scale_i > threshold` (or it is NaN).

    Attributes:
        threshold: at least 0.
        scale: float32 [in_features], or None for ones: set by the criterion.
        center: float32 [in_features], or None for zeros: the value that a skipped entry is taken to have. Its product
            with the weight is a constant, so that a skipped column of the weight is not read for it.
        relative: compare with `threshold * ‖x‖` instead, the norm of each token's own input.
        gate: x is not the input of the site but what its outputs are multiplied by, the activated gate of a gated MLP,
            of which the site is the up-projection: an output whose entry is skipped counts as zero. All of the above is
            of as many entries as there are outputs; there is no center.

    Example:
        >>> Rule(0.5).apply(torch.tensor([0.4, -2.0]))
        tensor([ 0., -2.])
        >>> Rule(0.5, relative=True).apply(torch.tensor([3.0, -4.0, 2.0]))
        tensor([ 3., -4.,  0.])
        >>> Rule(0.5, center=torch.tensor([0.25, 0.0])).apply(torch.tensor([0.4, -2.0]))
        tensor([ 0.2500, -2.0000])
    """

    threshold: float
    scale: Tensor | None = None
    center: Tensor | None = None
    relative: bool = False
    gate: bool = False

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rule):
            return NotImplemented
        mine, others = (self.scale, self.center), (other.scale, other.center)
        kind = (self.threshold, self.relative, self.gate)
        return kind == (other.threshold, other.relative, other.gate) and all(
            a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(mine, others, strict=True)
        )

    def __hash__(self) -> int:
        return hash((self.threshold, self.relative))

    def __str__(self) -> str:
        parts = (("x‖x‖", self.relative), ("scaled", self.scale is not None), ("centered", self.center is not None),
                 ("gate", self.gate))  # fmt: skip
        return f"{self.threshold:9.4g}" + "".join(f" {word}" for word, used in parts if used)

    def compared(self, x: Tensor) -> Tensor:
        """What has a score of `|x| * scale` that the bare threshold is compared with: `x`, centered and divided."""
        y = x if self.center is None else x.float() - self.center
        if not self.relative:
            return y
        return y.float() / norm_of(x).clamp_min(torch.finfo(torch.float32).tiny)

    def keep(self, x: Tensor) -> Tensor:
        """Bool mask of what is kept of `x` [..., in_features]."""
        return keep_mask(x, self.threshold, self.scale, self.center, self.relative)

    def apply(self, x: Tensor) -> Tensor:
        """`x` with the skipped entries replaced by their center."""
        return fill(x, self.keep(x), self.center)
