"""Blocks in which a sparse model runs dense, or skips in prefill too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from deadband.layers.scope import scope
from deadband.layers.sparse import ALL_ROWS
from deadband.sparsify.report import require_sparse


@contextlib.contextmanager
def sparse_prefill(model: nn.Module) -> Iterator[nn.Module]:
    """Every token through the sparse path, however many come at once, for the thread or task in the block: to evaluate.

    Example:
        >>> model = deadband.sparsify_(nn.Sequential(nn.Linear(2, 1)), {"0": 1.0})
        >>> with torch.no_grad(), sparse_prefill(model):
        ...     torch.equal(model(torch.full((9, 2), 0.5)), model[0].bias.expand(9, 1))
        True
    """
    with _sparse_rows(model, ALL_ROWS):
        yield model


@contextlib.contextmanager
def dense(model: nn.Module) -> Iterator[nn.Module]:
    """Nothing is skipped by the thread or task in the block: the dense model, on the same weights, to compare with."""
    with _sparse_rows(model, 0):
        yield model


def _sparse_rows(model: nn.Module, rows: int) -> contextlib.AbstractContextManager[Any]:
    return scope({module: (rows, None) for module in require_sparse(model).values()})
