"""Weights of other frameworks in PyTorch."""

from batchnorm.repair.porting.porting import PortedNorm, Porting, Settings, port

__all__ = ["PortedNorm", "Porting", "Settings", "port"]
