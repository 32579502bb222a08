"""Prepared decoding: one token's work as one compiled graph."""

from deadband.decoding.breakeven import break_even, tune_
from deadband.decoding.decoder import (
    DecodeReport,
    DecodeWarning,
    decode_report,
    is_prepared,
    prepare_decode_,
    unprepare_decode_,
)

__all__ = [
    "DecodeReport",
    "DecodeWarning",
    "break_even",
    "decode_report",
    "is_prepared",
    "prepare_decode_",
    "tune_",
    "unprepare_decode_",
]
