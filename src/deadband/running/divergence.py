"""How far the distributions of two models are apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


@dataclasses.dataclass(frozen=True)
class LogitSums:
    """Sums over outputs of a dense and a sparse model: how far apart they are, and how well they predict.

    Attributes:
        outputs: how many.
        kl: KL(dense ‖ sparse) in nats.
        targets: outputs whose next token is known; `nll` and `dense_nll` are its negative log-likelihoods.
        agreements: outputs with the same likeliest token, where that was asked for.
    """

    outputs: int = 0
    kl: float = 0.0
    targets: int = 0
    nll: float = 0.0
    dense_nll: float = 0.0
    agreements: int = 0

    def __add__(self, other: LogitSums) -> LogitSums:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return LogitSums(*(mine + theirs for mine, theirs in pairs))


def compare_logits(
    dense: Tensor, sparse: Tensor, places: Iterable[Any], targets: Tensor | None = None, *, agreement: bool = False
) -> LogitSums:
    """Sums over outputs of two models, a few at a time: only their log-probabilities are in float32.

    Args:
        dense, sparse: logits [..., vocabulary].
        places: indices of outputs, of some at a time, as of `kept_places`.
        targets: the next tokens, int64 [...], below zero where there is none.
        agreement: count where both have the same likeliest token. NaN agrees with nothing.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> compare_logits(logits, logits.flip(-1), [0, 1], agreement=True)
        LogitSums(outputs=2, kl=0.9242343306541443, targets=0, nll=0.0, dense_nll=0.0, agreements=0)
    """
    total = LogitSums()
    for at in places:
        log_p, log_q = (F.log_softmax(logits[at].to(sparse.device).float(), -1) for logits in (dense, sparse))
        total += _sums(log_p, log_q, None if targets is None else targets[at].to(sparse.device), agreement)
        del log_p, log_q  # or these would still be there while the next ones are made
    return total


def kept_places(keep: Tensor, size: int = 128) -> Iterator[tuple[Tensor, ...]]:
    """Indices of where `keep` [...] is True, up to `size` at a time."""
    return (tuple(index.T) for index in keep.nonzero().split(size))


def _sums(log_p: Tensor, log_q: Tensor, targets: Tensor | None, agreement: bool) -> LogitSums:
    found = {"kl": divergence(log_p, log_q).double().sum()}
    if targets is not None:
        known = targets >= 0
        at = targets.clamp_min(0)[..., None]
        found["targets"] = known.sum()
        found["nll"] = -log_q.gather(-1, at)[known].double().sum()
        found["dense_nll"] = -log_p.gather(-1, at)[known].double().sum()
    if agreement:
        found["agreements"] = ((log_p.argmax(-1) == log_q.argmax(-1)) & ~log_q.isnan().any(-1)).sum()
    values = dict(zip(found, torch.stack([each.double() for each in found.values()]).tolist(), strict=True))  # one wait
    counts = {name: int(values.pop(name)) for name in ("targets", "agreements") if name in values}
    return LogitSums(log_p[..., 0].numel(), **values, **counts)
