"""Sparse and quantised layers, sites, the formats of weights, and the rule by which a layer skips."""

from deadband.layers.formats import QuantizedWeight, WeightFormat
from deadband.layers.quantized import QuantizedLinear, QuantizedSparseLinear
from deadband.layers.rounding import quantize
from deadband.layers.rule import Rule
from deadband.layers.sites import find_sites, sparse_sites
from deadband.layers.sparse import SparseLinear

__all__ = [
    "QuantizedLinear",
    "QuantizedSparseLinear",
    "QuantizedWeight",
    "Rule",
    "SparseLinear",
    "WeightFormat",
    "find_sites",
    "quantize",
    "sparse_sites",
]
