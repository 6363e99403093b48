"""The auditor: rules, the probe that watches a model for them, and what they find."""

from batchnorm.audit.check import audit, check
from batchnorm.audit.checkpoint import SUFFIXES, checkpoints_at, read_checkpoint
from batchnorm.audit.distance import Distance
from batchnorm.audit.finding import Finding, Report, Severity
from batchnorm.audit.noise import Noise
from batchnorm.audit.probe import Probe
from batchnorm.audit.profile import QUANTILES, GradientNorm, LayerProfile, Period
from batchnorm.audit.rule import Rule
from batchnorm.audit.rules import RULES, find_rule
from batchnorm.audit.script import run_script
from batchnorm.audit.state import LayerState, State, state_of

__all__ = [
    "QUANTILES",
    "RULES",
    "SUFFIXES",
    "Distance",
    "Finding",
    "GradientNorm",
    "LayerProfile",
    "LayerState",
    "Noise",
    "Period",
    "Probe",
    "Report",
    "Rule",
    "Severity",
    "State",
    "audit",
    "check",
    "checkpoints_at",
    "find_rule",
    "read_checkpoint",
    "run_script",
    "state_of",
]
