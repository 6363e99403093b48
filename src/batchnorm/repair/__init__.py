"""Repairs: what to do about a model's batch norm, one function each."""

from batchnorm.repair.accumulation import Accumulation, accumulate
from batchnorm.repair.activation_memory import ActivationMemory, activation_memory
from batchnorm.repair.adaptation import Adaptation, Cap, Entropy, adapt
from batchnorm.repair.averaging import Averaging, average
from batchnorm.repair.conversion import ChannelLayerNorm, ChannelRMSNorm, Conversion, convert
from batchnorm.repair.folding import FoldedBatchNorm, Folding, fold
from batchnorm.repair.freezing import Freezing, freeze, unfreeze
from batchnorm.repair.frozen_statistics import frozen_statistics
from batchnorm.repair.parameter_groups import parameter_groups
from batchnorm.repair.pooling import pooled_forward
from batchnorm.repair.porting import Porting, port
from batchnorm.repair.recalibration import Recalibration, recalibrate
from batchnorm.repair.reduction import Reduction, reduce_statistics
from batchnorm.repair.rematerialization import Rematerialization, rematerialize

__all__ = [
    "Accumulation",
    "ActivationMemory",
    "Adaptation",
    "Averaging",
    "Cap",
    "ChannelLayerNorm",
    "ChannelRMSNorm",
    "Conversion",
    "Entropy",
    "FoldedBatchNorm",
    "Folding",
    "Freezing",
    "Porting",
    "Recalibration",
    "Reduction",
    "Rematerialization",
    "accumulate",
    "activation_memory",
    "adapt",
    "average",
    "convert",
    "fold",
    "freeze",
    "frozen_statistics",
    "parameter_groups",
    "pooled_forward",
    "port",
    "recalibrate",
    "reduce_statistics",
    "rematerialize",
    "unfreeze",
]
