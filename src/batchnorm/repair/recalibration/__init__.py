"""Running statistics computed again, as those of all the data."""

from batchnorm.repair.recalibration.recalibration import Recalibration, Shift, recalibrate

__all__ = ["Recalibration", "Shift", "recalibrate"]
