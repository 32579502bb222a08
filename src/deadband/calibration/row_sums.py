"""What watchers keep of the rows that sites see: sums over them, sums of their products, and samples."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from deadband.calibration.watcher import InputWatcher


class RowSums:
    """Sums over rows, by site or by whatever else has some of its own.

    Attributes:
        totals: the sums.
        counts: of how many rows, or of what else was counted.

    Example:
        >>> sums = RowSums()
        >>> sums.add("site", torch.tensor([1.0, 3.0]), 2)
        >>> sums.mean("site")
        tensor([0.5000, 1.5000])
    """

    def __init__(self) -> None:
        self.totals: dict[Any, Tensor] = {}
        self.counts: dict[Any, int] = {}

    def add(self, key: Any, total: Tensor, rows: int) -> None:
        """Add the sum over some rows."""
        self.totals[key] = self.totals[key] + total if key in self.totals else total
        self.count(key, rows)

    def add_products(self, key: Any, rows: Tensor) -> None:
        """Add the products of every two entries of each row [rows, features], without a second matrix for them."""
        if key not in self.totals:
            self.totals[key] = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.totals[key].addmm_(rows.T, rows)
        self.count(key, len(rows))

    def count(self, key: Any, rows: int) -> None:
        """Count rows whose sum is not wanted."""
        self.counts[key] = self.counts.get(key, 0) + rows

    def reached(self, key: Any) -> bool:
        """Whether there were any rows."""
        return self.counts.get(key, 0) > 0

    def mean(self, key: Any) -> Tensor:
        """The sum over the rows by their number."""
        return self.totals[key] / self.counts[key]


class InputProducts(InputWatcher):
    """Sums of x xᵀ over the rows of each site's input, [in_features, in_features], without those that are not finite.

    Args:
        wanted: the sites whose products are summed; of others, the rows are counted alone.
        wide: products of each call in float32, their sums in float64 on the CPU; otherwise all in float32 in place.
    """

    def __init__(self, wanted: Collection[str], *, wide: bool = False) -> None:
        super().__init__()
        self.wanted, self.wide = frozenset(wanted), wide
        self.sums = RowSums()

    def see(self, name: str, x: Tensor) -> None:
        """Add the rows of one call."""
        rows = self.rows(name, x).float()
        rows = rows[rows.isfinite().all(-1)]
        if name not in self.wanted:
            self.sums.count(name, len(rows))
        elif self.wide:
            self.sums.add(name, (rows.T @ rows).double().cpu(), len(rows))
        else:
            self.sums.add_products(name, rows)


def sample_rows(rows: Tensor, about: int, most: int) -> Tensor:
    """Some rows, evenly from all: about so many, and no more than `most`; a copy."""
    return rows[:: max(len(rows) // about, 1)][:most].clone()
