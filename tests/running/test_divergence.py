"""Sums over two models' logits, a few outputs at a time."""

import pytest
import torch
from torch.nn import functional as F

from deadband.running.divergence import LogitSums, compare_logits, kept_places


@pytest.mark.parametrize("size", [1, 3, 128])
def test_sums_are_those_of_all_outputs_at_once(size):
    generator = torch.Generator().manual_seed(0)
    dense, sparse = torch.randn(2, 4, 7, 11, generator=generator)
    keep = torch.rand(4, 7, generator=generator) < 0.7
    targets = torch.randint(-1, 11, (4, 7), generator=generator)
    sums = compare_logits(dense, sparse, kept_places(keep, size), targets, agreement=True)
    log_p, log_q = (F.log_softmax(logits[keep].double(), -1) for logits in (dense, sparse))
    known = targets[keep] >= 0
    chosen = targets[keep][known, None]
    assert (sums.outputs, sums.targets) == (int(keep.sum()), int(known.sum()))
    assert sums.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-5)
    assert sums.nll == pytest.approx(-log_q[known].gather(-1, chosen).sum().item(), rel=1e-5)
    assert sums.dense_nll == pytest.approx(-log_p[known].gather(-1, chosen).sum().item(), rel=1e-5)
    assert sums.agreements == int((log_p.argmax(-1) == log_q.argmax(-1)).sum())


def test_nan_agrees_with_nothing_and_no_outputs_are_zero():
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    broken = logits.clone()
    broken[1, 0] = torch.nan
    sums = compare_logits(logits, broken, [0, 1], agreement=True)
    assert sums.agreements == 1
    assert sums.kl != sums.kl
    assert compare_logits(logits, logits, kept_places(torch.zeros(2, dtype=torch.bool))) == LogitSums()
