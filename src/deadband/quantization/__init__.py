"""Weights of 8 and 4 bits: formats, rounding, what rounding needs of the inputs, mixed precision, GGUF."""

from deadband.calibration.calibration import second_moments_of
from deadband.layers.formats import (
    DEFAULT_INT4,
    FORMATS,
    GROUP_SIZES,
    QuantizedWeight,
    WeightFormat,
    empty_weight,
    pack,
    unpack,
)
from deadband.layers.rounding import quantize
from deadband.quantization.hessians import input_hessians

__all__ = [
    "DEFAULT_INT4",
    "FORMATS",
    "GROUP_SIZES",
    "QuantizedWeight",
    "WeightFormat",
    "empty_weight",
    "input_hessians",
    "pack",
    "quantize",
    "second_moments_of",
    "unpack",
]
