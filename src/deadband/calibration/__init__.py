"""What each site's input looks like: statistics from one pass over data."""

from deadband.calibration.calibration import Calibration, calibrate, second_moments_of
from deadband.calibration.inspection import Inspection, inspect

__all__ = ["Calibration", "Inspection", "calibrate", "inspect", "second_moments_of"]
