"""Planning: over how many ranks to synchronize statistics, what it costs and what it gains."""

from batchnorm.planning.answer import Choice, Plan
from batchnorm.planning.layers import PlannedLayer
from batchnorm.planning.measuring import measure_network
from batchnorm.planning.network import INFINIBAND, LOOPBACK, NVLINK, Network
from batchnorm.planning.planner import plan, plan_layers
from batchnorm.planning.traffic import Traffic

__all__ = [
    "INFINIBAND",
    "LOOPBACK",
    "NVLINK",
    "Choice",
    "Network",
    "Plan",
    "PlannedLayer",
    "Traffic",
    "measure_network",
    "plan",
    "plan_layers",
]
