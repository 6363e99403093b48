"""Repairs: what to do about a model's batch norm, one file each."""

from batchnorm.repair.activation_memory import ActivationMemory, activation_memory
from batchnorm.repair.rematerialization import Rematerialization, rematerialize

__all__ = ["ActivationMemory", "Rematerialization", "activation_memory", "rematerialize"]
