"""The rules, one file each."""

from batchnorm.audit.rule import Rule
from batchnorm.audit.rules.bn103_stale_statistics import StaleStatistics
from batchnorm.audit.rules.bn108_moved_without_gradients import MovedWithoutGradients
from batchnorm.audit.rules.bn109_one_value import OneValuePerChannel

__all__ = ["RULES", "find_rule"]

RULES: tuple[type[Rule], ...] = (StaleStatistics, MovedWithoutGradients, OneValuePerChannel)
"""By code."""


def find_rule(code: str) -> type[Rule]:
    """The rule with a code, in upper or lower case; raise `KeyError` with a sentence if none."""
    for rule in RULES:
        if rule.code == code.upper():
            return rule
    known = ", ".join(rule.code for rule in RULES)
    raise KeyError(f"no rule has the code {code!r}; the rules are {known}")
