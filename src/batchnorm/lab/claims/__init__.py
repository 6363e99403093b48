"""The claims, one file each."""

from batchnorm.lab.claim import AnyClaim
from batchnorm.lab.claims.c01_converges_faster import ConvergesFaster
from batchnorm.lab.claims.c02_higher_learning_rates import HigherLearningRates
from batchnorm.lab.claims.c03_less_careful_initialization import LessCarefulInitialization
from batchnorm.lab.claims.c04_regularizes_by_noise import RegularizesByNoise
from batchnorm.lab.claims.c05_smooths_optimization import SmoothsOptimization
from batchnorm.lab.claims.c06_internal_covariate_shift import InternalCovariateShift
from batchnorm.lab.claims.c07_not_expressiveness import NotExpressiveness
from batchnorm.lab.claims.c08_keeps_gradients import KeepsGradients
from batchnorm.lab.claims.c09_needs_less_care import NeedsLessCare
from batchnorm.lab.claims.c10_stable_statistics import StableStatistics
from batchnorm.lab.claims.c11_fails_at_small_batches import FailsAtSmallBatches
from batchnorm.lab.claims.c12_sorted_batches import SortedBatches
from batchnorm.lab.claims.c13_ranks_disagree import RanksDisagree
from batchnorm.lab.claims.c14_one_by_one import OneByOne
from batchnorm.lab.claims.c15_leaks_across_samples import LeaksAcrossSamples
from batchnorm.lab.claims.c16_leaks_over_time import LeaksOverTime
from batchnorm.lab.claims.c17_layer_norm import LayerNorm
from batchnorm.lab.claims.c18_distribution_shift import DistributionShift
from batchnorm.lab.claims.c19_poor_data import PoorData
from batchnorm.lab.claims.c20_inconsistent_gain import InconsistentGain
from batchnorm.lab.claims.c21_pitfalls import Pitfalls

__all__ = ["CLAIMS", "find_claim"]

CLAIMS: tuple[type[AnyClaim], ...] = (
    ConvergesFaster,
    HigherLearningRates,
    LessCarefulInitialization,
    RegularizesByNoise,
    SmoothsOptimization,
    InternalCovariateShift,
    NotExpressiveness,
    KeepsGradients,
    NeedsLessCare,
    StableStatistics,
    FailsAtSmallBatches,
    SortedBatches,
    RanksDisagree,
    OneByOne,
    LeaksAcrossSamples,
    LeaksOverTime,
    LayerNorm,
    DistributionShift,
    PoorData,
    InconsistentGain,
    Pitfalls,
)


def find_claim(name: str) -> type[AnyClaim]:
    """The claim of that name or number.

    Raises:
        LookupError: There is none.
    """
    for claim in CLAIMS:
        if name in (claim.name, str(claim.number)):
            return claim
    raise LookupError(f"no claim {name!r}; `batchnorm lab` lists them")
