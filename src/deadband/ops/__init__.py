"""The operators, each with its torch reference, and their backends."""

import deadband.ops.cpu  # noqa: F401  (it registers itself)
from deadband.ops.linear import dense_linear, quantized_linear, sparse_linear

__all__ = ["dense_linear", "quantized_linear", "sparse_linear"]
