"""Convert the norms of a model to others and back."""

from batchnorm.repair.conversion.channel_first import ChannelLayerNorm, ChannelRMSNorm
from batchnorm.repair.conversion.model import convert
from batchnorm.repair.conversion.result import Conversion

__all__ = ["ChannelLayerNorm", "ChannelRMSNorm", "Conversion", "convert"]
