"""Falcon's linear layer, a subclass of nn.Linear that computes the same, has a sparse twin too."""

from __future__ import annotations

from transformers.models.falcon.modeling_falcon import FalconLinear

from deadband.layers.quantized import QUANTIZED_CLASSES, QuantizedLinear, QuantizedSite
from deadband.layers.sparse import SPARSE_CLASSES, SparseSite


class SparseFalconLinear(SparseSite, FalconLinear):
    """The sparse twin of FalconLinear."""

    dense_class = FalconLinear


class QuantizedFalconLinear(QuantizedLinear, FalconLinear):
    """A FalconLinear with a quantised weight."""


class QuantizedSparseFalconLinear(QuantizedSite, SparseFalconLinear):
    """A sparse FalconLinear with a quantised weight."""

    dense_class = QuantizedFalconLinear


SPARSE_CLASSES |= {FalconLinear: SparseFalconLinear, QuantizedFalconLinear: QuantizedSparseFalconLinear}
QUANTIZED_CLASSES |= {FalconLinear: QuantizedFalconLinear, SparseFalconLinear: QuantizedSparseFalconLinear}
