"""How far the distributions of two models are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def mean_and_error(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """Weighted mean and its standard error, NaN for fewer than two values.

    Values are means of clusters whose sizes are the weights, so this is the ratio estimator of Cochran, Sampling
    Techniques, 3rd edition 1977, chapter 9A; with equal weights it is the usual error of a mean.

    Example:
        >>> mean_and_error([1.0, 2.0, 3.0, 4.0])
        (2.5, 0.6454972243679028)
    """
    if not values:
        return math.nan, math.nan
    total = math.fsum(weights) if weights is not None else len(values)
    shares = [weight / total for weight in weights] if weights is not None else [1 / len(values)] * len(values)
    mean = math.fsum(share * value for share, value in zip(shares, values, strict=True))
    if len(values) < 2:
        return mean, math.nan
    squares = math.fsum((share * (value - mean)) ** 2 for share, value in zip(shares, values, strict=True))
    return mean, math.sqrt(squares * len(values) / (len(values) - 1))


def logits_of(model: nn.Module, output: Any) -> Tensor:
    """The logits in what a language model returned, [batch, tokens, vocabulary].

    Raises:
        ValueError: there are none.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(f"a {type(model).__name__}'s output has no logits; expected a language model of transformers")
    return logits


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) over the last dimension of two tensors of log-probabilities, in nats; NaN where either is."""
    p = log_p.exp()
    return torch.where(p == 0, 0, p * (log_p - log_q)).sum(-1)  # 0 log 0 is 0
