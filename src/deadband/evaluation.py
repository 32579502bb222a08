"""Quality of a sparse model beside the dense one: perplexity, KL divergence, top-1 agreement."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deadband.running import evaluating, progress_bar, run
from deadband.sparsify import dense, sparse_prefill, sparse_sites, sparsity

PROTOCOL = "all tokens sparse"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Quality on some windows of text, every token through the sparse path.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the next token.
        dense_perplexity: the same for the dense model on the same weights.
        kl: mean KL(dense ‖ sparse) of the next-token distributions, in nats.
        agreement: the fraction of positions where both models' likeliest next token is the same.
        sparsity: achieved on these tokens, weighted by weight bytes; NaN if the model does not count.
        tokens, windows: how much was judged.
        protocol: which tokens were sparse.
    """

    perplexity: float
    dense_perplexity: float
    kl: float
    agreement: float
    sparsity: float
    tokens: int
    windows: int
    protocol: str = PROTOCOL

    def __str__(self) -> str:
        return (
            f"sparsity {self.sparsity:.1%}   perplexity {self.perplexity:.3f} (dense {self.dense_perplexity:.3f})   "
            f"KL {self.kl:.4f} nats   top-1 agreement {self.agreement:.1%}   "
            f"({self.tokens:,} tokens in {self.windows} windows, {self.protocol})"
        )


def dense_logits(model: nn.Module, windows: Sequence[Any], *, progress: bool = True) -> list[Tensor]:
    """Logits of the dense model for each window, [batch, tokens, vocabulary]: `reference` for several evaluations."""
    with evaluating(model):
        return [_dense(model, window) for window in progress_bar(windows, "dense", progress)]


def evaluate(
    model: nn.Module,
    windows: Sequence[Any],
    *,
    reference: Sequence[Tensor] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Compare a language model with its own dense form, every token through the sparse path.

    Args:
        model: a causal language model whose output has `logits`, sparse or dense (then it is compared with itself).
        windows: batches with `input_ids` [batch, tokens], as `deadband.text.token_windows` makes; padding that their
            `attention_mask` marks is left out.
        reference: what `dense_logits` returned for the same windows; otherwise the dense model runs too.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: there are no windows, or `reference` has another number of them.
    """
    if not windows:
        raise ValueError("windows is empty; expected at least one batch of token ids")
    if reference is not None and len(reference) != len(windows):
        raise ValueError(f"reference has {len(reference)} windows, expected {len(windows)}")
    is_sparse = bool(sparse_sites(model))
    counts = all(module.counts is not None for module in sparse_sites(model).values())
    achieved = math.nan if is_sparse else 0.0
    if is_sparse and counts:
        sparsity(model, reset=True)
    totals = torch.zeros(5, dtype=torch.float64)
    with evaluating(model):
        for index, window in enumerate(progress_bar(windows, "evaluate", progress)):
            before = reference[index] if reference is not None else _dense(model, window)
            after = _sparse(model, window) if is_sparse else before
            totals += _compare(before, after, window)
    nll, dense_nll, kl, same, tokens = totals.tolist()
    return Evaluation(
        perplexity=math.exp(nll / tokens),
        dense_perplexity=math.exp(dense_nll / tokens),
        kl=kl / tokens,
        agreement=same / tokens,
        sparsity=sparsity(model).total if is_sparse and counts else achieved,
        tokens=int(tokens),
        windows=len(windows),
    )


def _dense(model: nn.Module, window: Any) -> Tensor:
    if not sparse_sites(model):
        return run(model, window, use_cache=False).logits
    with dense(model):
        return run(model, window, use_cache=False).logits


def _sparse(model: nn.Module, window: Any) -> Tensor:
    with sparse_prefill(model):
        return run(model, window, use_cache=False).logits


def _compare(before: Tensor, after: Tensor, window: Any) -> Tensor:
    """Sums over predicted positions: sparse and dense negative log-likelihood, KL, agreements, and their number."""
    ids = window["input_ids"].to(before.device)
    mask = window.get("attention_mask", torch.ones_like(ids)).to(before.device)
    valid = (mask[:, :-1] * mask[:, 1:]).bool()
    targets = ids[:, 1:][valid]
    p, q = before[:, :-1][valid], after[:, :-1][valid]  # [positions, vocabulary]
    sums = torch.zeros(5, dtype=torch.float64)
    for part in torch.arange(len(targets)).split(128):  # log-probabilities in float32, a few positions at a time
        log_p, log_q = F.log_softmax(p[part].float(), -1), F.log_softmax(q[part].float(), -1)
        chosen = targets[part, None]
        sums += torch.stack(
            [
                -log_q.gather(-1, chosen).double().sum(),
                -log_p.gather(-1, chosen).double().sum(),
                (log_p.exp() * (log_p - log_q)).sum(-1).double().sum(),
                (log_p.argmax(-1) == log_q.argmax(-1)).double().sum(),
                torch.tensor(float(len(part)), dtype=torch.float64, device=before.device),
            ]
        ).cpu()
    return sums
