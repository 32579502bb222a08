"""Ready-made aggregate functions for ActivationSparsifier: one number for each feature, whatever the batch's shape.

They look at the input of a layer as rows of features and keep one float64 for each feature, so memory depends neither
on the batches' shapes nor on their number. The features lie along `feature_dim` where it is given; else along the
channels of a convolution or batch norm, and along the last dimension for every other layer.

    ActivationSparsifier(model, aggregate_fn=aggregate.mean_abs, reduce_fn=reduce.mean, mask_fn=mask.magnitude,
                         sparsity=0.5)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor


class Aggregate:
    """How the inputs of a layer add up to one number for each feature. Subclass it for another statistic.

    Example:
        >>> mean(mean(None, 0, torch.tensor([[1.0, 4.0]])), 1, torch.tensor([[3.0, 4.0], [5.0, 4.0]]))
        tensor([3., 4.], dtype=torch.float64)
    """

    def __call__(self, data: Any, rows: int, x: Tensor, dim: int = -1) -> Any:
        """What is known after one more input.

        Args:
            data: what was known before, [features] float64; None before the first input.
            rows: how many rows `data` stands for.
            x: the input, of any shape with the features along `dim`.
            dim: the dimension of the features.
        """
        others = [each for each in range(x.dim()) if each != dim % x.dim()]
        return self.add(data, rows, self.of_batch(x, others), rows_of(x, dim))

    def of_batch(self, x: Tensor, others: list[int]) -> Tensor:
        """One number for each feature of one input, float64."""
        raise NotImplementedError

    def add(self, data: Tensor | None, rows: int, batch: Tensor, batch_rows: int) -> Tensor:
        """What is known after a batch, from what was known before it and what the batch says."""
        raise NotImplementedError

    def merge(self, data: Tensor, rows: int, other: Tensor, other_rows: int) -> Tensor:
        """Put together what two ranks of distributed training know."""
        return self.add(data, rows, other, other_rows)


def rows_of(x: Tensor, dim: int) -> int:
    """Entries of x for each feature."""
    return x.numel() // max(x.shape[dim], 1)


def _sum(x: Tensor, others: list[int]) -> Tensor:
    # float32 inside a batch (torch adds in pairs), float64 across batches: summing float64 takes ten times as long
    dtype = torch.float32 if x.is_floating_point() and x.dtype.itemsize < 4 else None
    return _wide(x.sum(others, dtype=dtype) if others else x)


def _mean(x: Tensor, others: list[int]) -> Tensor:
    if not others or not (x.is_floating_point() and x.numel()):
        return _sum(x, others) / max(math.prod(x.shape[each] for each in others), 1)
    return _wide(x.mean(others, dtype=torch.float32 if x.dtype.itemsize < 4 else None))


def _magnitudes(x: Tensor) -> Tensor:
    # abs and a sum (or maximum) take a sixth of the time of torch.linalg.vector_norm on CPUs
    return x.to(torch.uint8) if x.dtype is torch.bool else x.abs()


def _wide(x: Tensor) -> Tensor:
    if x.is_complex():
        return x.to(torch.complex128)
    return x.to(torch.float64) if x.device.type != "mps" else x.float()


class Sum(Aggregate):
    """The sum of each feature over all rows."""

    def of_batch(self, x: Tensor, others: list[int]) -> Tensor:
        """Sums of one input."""
        return _sum(x, others)

    def add(self, data: Tensor | None, rows: int, batch: Tensor, batch_rows: int) -> Tensor:
        """Add."""
        return batch if data is None else data + batch


class Mean(Aggregate):
    """The mean of each feature over all rows, so that a shorter batch counts for less."""

    def of_batch(self, x: Tensor, others: list[int]) -> Tensor:
        """Means of one input."""
        return _mean(x, others)

    def add(self, data: Tensor | None, rows: int, batch: Tensor, batch_rows: int) -> Tensor:
        """Weigh both by their rows."""
        if data is None or not rows:
            return batch
        return torch.lerp(data, batch, batch_rows / max(rows + batch_rows, 1))


class MeanAbs(Mean):
    """The mean of abs(x) of each feature over all rows: what `mask.magnitude` is usually given."""

    def of_batch(self, x: Tensor, others: list[int]) -> Tensor:
        """Mean magnitudes of one input."""
        return super().of_batch(_magnitudes(x), others)


class MaxAbs(Aggregate):
    """The largest abs(x) of each feature."""

    def of_batch(self, x: Tensor, others: list[int]) -> Tensor:
        """Largest magnitudes of one input."""
        magnitudes = _magnitudes(x)
        if not others or not x.numel():
            return _wide(magnitudes.sum(others) if others else magnitudes)
        return _wide(magnitudes.amax(others))

    def add(self, data: Tensor | None, rows: int, batch: Tensor, batch_rows: int) -> Tensor:
        """The larger of both."""
        return batch if data is None else torch.maximum(data, batch)


@dataclasses.dataclass(frozen=True)
class Ema(Mean):
    """The exponential moving average of the batches' means: the newest counts for `1 - decay`.

    It starts from the first batch's mean, so that it has no pull towards zero.

    Raises:
        ValueError: decay is not from 0 up to but not 1.
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay!r}; expected a number from 0 up to but not 1")

    def add(self, data: Tensor | None, rows: int, batch: Tensor, batch_rows: int) -> Tensor:
        """Move towards the batch."""
        return batch if data is None or not rows else data * self.decay + batch * (1 - self.decay)

    def merge(self, data: Tensor, rows: int, other: Tensor, other_rows: int) -> Tensor:
        """The mean of both, weighted by rows: neither rank is newer."""
        return super().add(data, rows, other, other_rows)


sum = Sum()
mean = Mean()
mean_abs = MeanAbs()
max_abs = MaxAbs()
ema = Ema()


class Statistics(Aggregate):
    """What `deadband.calibrate` records of a linear layer's input; `ActivationSparsifier.calibration` collects it.

    Its data are a `SiteStatistics`; no mask is made from them, so reduce_fn and mask_fn may be left out.
    """

    keeps_statistics = True

    def __call__(self, data: Any, rows: int, x: Tensor, dim: int = -1) -> Any:
        """The statistics after one more input, [..., in_features]."""
        from deadband.calibration.site_statistics import SiteStatistics

        if data is None:
            data = SiteStatistics.of_features(x.shape[-1])
        data.observe(x.reshape(-1, x.shape[-1]))
        return data


statistics = Statistics()
