"""The auditor: rules, the probe that watches a model for them, and what they find."""

from batchnorm.audit.finding import Finding, Report, Severity
from batchnorm.audit.probe import Probe
from batchnorm.audit.rule import Rule
from batchnorm.audit.rules import RULES, find_rule
from batchnorm.audit.script import run_script

__all__ = ["RULES", "Finding", "Probe", "Report", "Rule", "Severity", "find_rule", "run_script"]
