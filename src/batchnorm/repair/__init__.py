"""Repairs: what to do about a model's batch norm, one file each."""

from batchnorm.repair.rematerialize import Rematerialization, rematerialize

__all__ = ["Rematerialization", "rematerialize"]
