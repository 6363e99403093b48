"""The rules, one file each."""

from batchnorm.audit.rule import Rule
from batchnorm.audit.rules.bn101_broken_statistics import BrokenStatistics
from batchnorm.audit.rules.bn102_half_frozen import HalfFrozen
from batchnorm.audit.rules.bn103_stale_statistics import StaleStatistics
from batchnorm.audit.rules.bn104_companions import Companions
from batchnorm.audit.rules.bn105_averaged_weights import AveragedWeights
from batchnorm.audit.rules.bn106_missing_statistics import MissingStatistics
from batchnorm.audit.rules.bn107_counted_twice import CountedTwice
from batchnorm.audit.rules.bn108_moved_without_gradients import MovedWithoutGradients
from batchnorm.audit.rules.bn109_one_value import OneValuePerChannel
from batchnorm.audit.rules.bn110_noisy_statistics import NoisyStatistics
from batchnorm.audit.rules.bn111_two_forwards import TwoForwards
from batchnorm.audit.rules.bn112_ranks_differ import RanksDiffer
from batchnorm.audit.rules.bn113_stripped_subclass import StrippedSubclass
from batchnorm.audit.rules.bn114_ranks_out_of_step import RanksOutOfStep
from batchnorm.audit.rules.bn115_sync_on_cpu import SyncOnCPU
from batchnorm.audit.rules.bn116_flag_changed import FlagChanged
from batchnorm.audit.rules.bn117_no_momentum import NoMomentum
from batchnorm.audit.rules.bn118_large_eps import LargeEps
from batchnorm.audit.rules.bn119_unfoldable import Unfoldable
from batchnorm.audit.rules.bn120_exported_training import ExportedTraining
from batchnorm.audit.rules.bn121_half_precision import HalfPrecision
from batchnorm.audit.rules.bn122_accumulated import Accumulated
from batchnorm.audit.rules.bn123_two_distributions import TwoDistributions
from batchnorm.audit.rules.bn124_sorted_batches import SortedBatches
from batchnorm.audit.rules.bn125_padding import Padding
from batchnorm.audit.rules.bn126_other_data import OtherData
from batchnorm.audit.rules.bn127_wasted import Wasted
from batchnorm.audit.rules.bn128_dead_channels import DeadChannels
from batchnorm.audit.rules.bn129_leak_over_time import LeakOverTime
from batchnorm.audit.rules.bn130_gradients import Gradients
from batchnorm.audit.rules.bn131_never_called import NeverCalled

__all__ = ["RULES", "find_rule"]

RULES: tuple[type[Rule], ...] = (
    BrokenStatistics,
    HalfFrozen,
    StaleStatistics,
    Companions,
    AveragedWeights,
    MissingStatistics,
    CountedTwice,
    MovedWithoutGradients,
    OneValuePerChannel,
    NoisyStatistics,
    TwoForwards,
    RanksDiffer,
    StrippedSubclass,
    RanksOutOfStep,
    SyncOnCPU,
    FlagChanged,
    NoMomentum,
    LargeEps,
    Unfoldable,
    ExportedTraining,
    HalfPrecision,
    Accumulated,
    TwoDistributions,
    SortedBatches,
    Padding,
    OtherData,
    Wasted,
    DeadChannels,
    LeakOverTime,
    Gradients,
    NeverCalled,
)
"""By code."""


def find_rule(code: str) -> type[Rule]:
    """The rule with a code, in upper or lower case; raise `KeyError` with a sentence if none."""
    for rule in RULES:
        if rule.code == code.upper():
            return rule
    known = ", ".join(rule.code for rule in RULES)
    raise KeyError(f"no rule has the code {code!r}; the rules are {known}")
