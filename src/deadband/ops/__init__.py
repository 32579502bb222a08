"""The operators, each with its torch reference, and their backends."""

import deadband.ops.cpu
import deadband.ops.experts
import deadband.ops.gated
import deadband.ops.gpu  # noqa: F401  (both register themselves)
from deadband.ops.linear import dense_linear, quantized_linear, sparse_linear

__all__ = ["dense_linear", "quantized_linear", "sparse_linear"]
