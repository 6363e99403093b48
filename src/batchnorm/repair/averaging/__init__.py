"""Averaged weights, with statistics that are theirs."""

from batchnorm.repair.averaging.averaging import Averaging, MergedLayer, average

__all__ = ["Averaging", "MergedLayer", "average"]
