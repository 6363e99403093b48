"""The auditor: rules, the probe that watches a model for them, and what they find."""

from batchnorm.audit.check import audit, check
from batchnorm.audit.checkpoint import SUFFIXES, checkpoints_at, read_checkpoint
from batchnorm.audit.distance import Distance
from batchnorm.audit.finding import Ending, Finding, Report, Severity
from batchnorm.audit.gathering import NoBatchesError, label_loss
from batchnorm.audit.noise import Noise
from batchnorm.audit.onnx_file import read_onnx
from batchnorm.audit.probe import Probe, watch
from batchnorm.audit.profile import QUANTILES, GradientNorm, LayerProfile, Period
from batchnorm.audit.rule import Rule
from batchnorm.audit.rules import RULES, find_rule
from batchnorm.audit.script import run_script
from batchnorm.audit.selection import Selection
from batchnorm.audit.state import LayerState, State, state_of
from batchnorm.models.graph import Graph

__all__ = [
    "QUANTILES",
    "RULES",
    "SUFFIXES",
    "Distance",
    "Ending",
    "Finding",
    "GradientNorm",
    "Graph",
    "LayerProfile",
    "LayerState",
    "NoBatchesError",
    "Noise",
    "Period",
    "Probe",
    "Report",
    "Rule",
    "Selection",
    "Severity",
    "State",
    "audit",
    "check",
    "checkpoints_at",
    "find_rule",
    "label_loss",
    "read_checkpoint",
    "read_onnx",
    "run_script",
    "state_of",
    "watch",
]
