"""From a budget to one rule per site. It gives a `Calibration` the method `allocate`."""

from deadband.allocation.budget import allocate, allocate_budgets
from deadband.allocation.thresholds import Thresholds

__all__ = ["Thresholds", "allocate", "allocate_budgets"]
