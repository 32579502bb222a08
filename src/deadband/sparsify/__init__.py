"""sparsify_ and densify_: linear layers become sparse, in place, and dense again."""

from deadband.layers.sites import sparse_sites
from deadband.sparsify.config import SparsityConfig
from deadband.sparsify.report import DriftWarning, SparsityReport, sparsity
from deadband.sparsify.scopes import dense, sparse_prefill
from deadband.sparsify.sparsify import densify_, sparsify_

__all__ = [
    "DriftWarning",
    "SparsityConfig",
    "SparsityReport",
    "dense",
    "densify_",
    "sparse_prefill",
    "sparse_sites",
    "sparsify_",
    "sparsity",
]
