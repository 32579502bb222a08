"""How far a site's sparsity may stray from its calibration before it counts as drift."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor


def range_of(skipped: Sequence[float], expected: float) -> tuple[float, float] | None:
    """Between which sparsities a site stays on data like the calibration's; None if there were too few rows to tell.

    The range is four standard deviations of `skipped` to either side, and at least 0.02: less than that matters neither
    to quality nor to speed. Each of `skipped` is of `JUDGED_ROWS` consecutive tokens, so this holds for the shortest
    window that is judged; longer ones vary less. Extremes would not do: the largest and smallest of a few are too close
    together, and of many they depend on how many there were. The deviation is that of a prediction from so few figures
    (Student's t), thus wider where there are fewer.

    Args:
        skipped: fractions, under thresholds about the final ones.
        expected: the mean that the final thresholds give; the range is moved there.
    """
    count = len(skipped)
    if count < _FEWEST_CHUNKS:
        return None
    mean = statistics.fmean(skipped)
    deviation = statistics.stdev(skipped) * math.sqrt((1 + 1 / count) * (count - 1) / (count - 3))
    spread = mean * (1 - mean)
    if spread > 0:  # fractions near 0 and 1 vary less
        deviation *= expected * (1 - expected) / spread
    margin = max(_DEVIATIONS * deviation, _LEAST_MARGIN)
    return round(max(expected - margin, 0.0), 4), round(min(expected + margin, 1.0), 4)


JUDGED_ROWS = 64
"""Rows (tokens) that a site has to have seen before its sparsity is compared with its range."""
_FEWEST_CHUNKS = 4  # of so many rows, for a standard deviation
_DEVIATIONS = 4.0
_LEAST_MARGIN = 0.02


class Spread:
    """The fraction skipped of every `JUDGED_ROWS` rows in turn, across calls; on the rows' device until it is read."""

    def __init__(self) -> None:
        self.whole: list[Tensor] = []
        self.rest = torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """Add the fraction skipped of each row, [rows]."""
        rows = torch.cat([self.rest.to(rows.device), rows.float()])
        end = len(rows) // JUDGED_ROWS * JUDGED_ROWS
        if end:
            self.whole.append(rows[:end].view(-1, JUDGED_ROWS).mean(1))
        self.rest = rows[end:]

    @property
    def skipped(self) -> list[float]:
        """The fractions, in their order."""
        return torch.cat([each.cpu() for each in self.whole]).tolist() if self.whole else []
