"""The processes that work together: what each has goes to all, and all fail if one does."""

from batchnorm.ranks.agreement import Ranks
from batchnorm.ranks.failure import SyncError
from batchnorm.ranks.naming import UNKNOWN, Caller, caller_of
from batchnorm.ranks.peers import GraphPeers, Peers, size_of
from batchnorm.ranks.step import step, undo_step

__all__ = [
    "UNKNOWN",
    "Caller",
    "GraphPeers",
    "Peers",
    "Ranks",
    "SyncError",
    "caller_of",
    "size_of",
    "step",
    "undo_step",
]
