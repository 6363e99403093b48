"""Small networks that take any normalization, or none."""

from batchnorm.lab.networks.convolutional import PlainNetwork, ResidualNetwork
from batchnorm.lab.networks.norms import Norm, Sequence, norm_of
from batchnorm.lab.networks.perceptron import Perceptron
from batchnorm.lab.networks.policy import RecurrentPolicy
from batchnorm.lab.networks.transformer import Transformer

__all__ = [
    "Norm",
    "Perceptron",
    "PlainNetwork",
    "RecurrentPolicy",
    "ResidualNetwork",
    "Sequence",
    "Transformer",
    "norm_of",
]
