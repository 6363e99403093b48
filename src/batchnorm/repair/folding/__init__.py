"""Batch norms folded into the convolutions and linear layers next to them."""

from batchnorm.repair.folding.folded import FoldedBatchNorm
from batchnorm.repair.folding.folding import Folding, fold

__all__ = ["FoldedBatchNorm", "Folding", "fold"]
