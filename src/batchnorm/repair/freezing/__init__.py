"""Batch norm layers frozen so that it lasts."""

from batchnorm.repair.freezing.freezing import Freezing, Frozen, Switches, freeze, unfreeze

__all__ = ["Freezing", "Frozen", "Switches", "freeze", "unfreeze"]
