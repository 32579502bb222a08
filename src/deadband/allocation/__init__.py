"""From a budget to one rule per site. A `Calibration` from here has the method `allocate`."""

from deadband.allocation.budget import allocate, allocate_budgets
from deadband.allocation.thresholds import Thresholds
from deadband.calibration.calibration import Calibration, calibrate

__all__ = ["Calibration", "Thresholds", "allocate", "allocate_budgets", "calibrate"]
