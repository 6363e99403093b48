"""Batch norm adapted to what a model is given at inference."""

from batchnorm.repair.adaptation.adaptation import Adaptation, Cap, Entropy, LayerDrift, adapt

__all__ = ["Adaptation", "Cap", "Entropy", "LayerDrift", "adapt"]
